"""Rows to prompted examples, in worker processes: render, check, fold, encode.

What an example is depends on its row, its template and the seed alone, never on workers or chunks.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from metro.data.datasets import JsonlRows, name_of
from metro.data.prompts.instruction import flip
from metro.data.prompts.limits import MissingAnswer
from metro.data.prompts.sandbox import ProtectedRow
from metro.data.prompts.templates import PromptTemplate, RenderedExample
from metro.modeling.text_metro_t5 import EOS_ID, Vocabulary, normalize_text

_MAX_REASON_CHARS = 160
_CACHED_TARGETS = 4096
_DRAWS = re.compile(r"\|\s*(?:choice|random)\b")


class RenderingSettings(NamedTuple):
    """What makes the examples what they are."""

    seed: int
    fold_whitespace: bool
    needs_choices: bool
    """Examples whose answer is not one of at least two options are dropped."""
    instruction_text: str
    with_instruction: bool = True
    """Examples get the fields of FLIPPED, too."""


class SplitRows(NamedTuple):
    """A split of a dataset."""

    split: str
    rows: Sequence[dict]


class Part(NamedTuple):
    """One side (train or valid) of one dataset: all its templates over all its rows."""

    dataset: str
    subset: str | None
    side: str
    splits: tuple[SplitRows, ...]
    """They follow one another; row numbers go on."""
    templates: tuple[PromptTemplate, ...]
    limit: int | None
    """Take so many rows, spread evenly: datasets may be sorted by label."""

    @property
    def num_rows(self) -> int:
        total = sum(len(split.rows) for split in self.splits)
        return total if self.limit is None else min(total, self.limit)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, str, dict | None, str]]:
        """(row number, split, row, problem) of the rows taken, from the start-th on."""
        total = sum(len(split.rows) for split in self.splits)
        taken = self.num_rows
        wanted = [i * total // taken for i in range(start, stop)]
        first = 0
        for split, rows in self.splits:
            inside = [i - first for i in wanted if first <= i < first + len(rows)]
            for index, row, problem in _read_rows(rows, inside):
                yield first + index, split, row, problem
            first += len(rows)


def _read_rows(rows: Sequence[dict], indices: list[int]) -> Iterator[tuple[int, Any, str]]:
    """A broken line costs itself alone; neighbouring rows of the hub's tables come in one read."""
    if isinstance(rows, JsonlRows):
        for index in indices:
            try:
                yield index, rows[index], ""
            except ValueError as error:
                yield index, None, f"unreadable row: {str(error).partition(f'row {index}: ')[2]}"
    elif indices:
        is_run = indices[-1] - indices[0] + 1 == len(indices)
        found = rows[indices[0] : indices[-1] + 1] if is_run else [rows[i] for i in indices]
        yield from ((index, row, "") for index, row in zip(indices, found, strict=True))


class Dropped(NamedTuple):
    """Examples left out (or kept with a flaw) for one reason."""

    count: int
    first: str
    """Where the first one stands, and what exactly was wrong."""


class EncodedTask(NamedTuple):
    """The examples of one template in a chunk of rows."""

    payload: tuple
    """Arrays and bytes for the writer of the format."""
    dropped: dict[str, Dropped]
    noted: dict[str, Dropped]


class Problem(Exception):
    """Why a row gives no example of a template."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail


def make_example(
    template: PromptTemplate, row: dict, number: int, split: str, settings: RenderingSettings
) -> dict:
    """One prompted example, with every field of the format.

    Raises:
        Problem: there is none; the reason is worded for people.
    """
    seed = example_seed(settings.seed, template, split, number)
    try:
        rendered = template.render_example(row, seed=seed)
    except MissingAnswer as error:
        raise Problem("label out of range of the answer choices", _plain(error)) from None
    except ValueError as error:
        raise Problem("rendering failed", _plain(error)) from None
    _check(rendered, settings)
    choices, label = rendered.choices, rendered.label
    flipped_input = instruction = None
    if label is not None and settings.with_instruction:
        try:
            flipped = flip(template, row, instruction_text=settings.instruction_text, seed=seed)
            flipped_input, instruction = flipped.input, flipped.instruction
        except ValueError as error:
            if settings.needs_choices:
                raise Problem("no instruction to guess", _plain(error)) from None
    fold = _fold if settings.fold_whitespace else str
    return {
        "task": template.task_name,
        "dataset": template.dataset,
        "subset": template.subset,
        "prompt_name": template.name,
        "split": split,
        "row": number,
        "input": fold(rendered.input),
        "target": fold(rendered.target),
        "answer_choices": None if choices is None else [fold(choice) for choice in choices],
        "label": label,
        "flipped_input": flipped_input,
        "instruction": instruction,
    }


def _check(rendered: RenderedExample, settings: RenderingSettings) -> None:
    if rendered.missing:
        fields = ", ".join(map(repr, rendered.missing))
        raise Problem("missing field", f"the row has no {fields}")
    if rendered.target is None:
        raise Problem("no answer part", "the template gives this row no `|||`")
    if not rendered.target.strip():
        raise Problem("empty target")
    if not rendered.input.strip():
        raise Problem("empty input")
    if settings.needs_choices:
        if rendered.choices is None:
            raise Problem("no answer choices")
        if rendered.label is None:
            raise Problem("answer not among the choices", _not_among(rendered))
        if len(set(rendered.choices)) < 2:
            raise Problem("a single answer choice", repr(rendered.choices))


def _not_among(rendered: RenderedExample) -> str:
    return _short(f"{rendered.target!r} is not in {rendered.choices}")


def example_seed(seed: int, template: PromptTemplate, split: str, number: int) -> int:
    """Of Jinja's ``choice`` in one example: other examples have other draws."""
    if not _DRAWS.search(template.jinja + (template.answer_choices or "")):
        return 0  # nothing is drawn
    name = (seed, template.dataset, template.subset, template.name, split, number)
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest(), "little")


def _fold(text: str) -> str:
    return " ".join(text.split())


def _plain(error: ValueError) -> str:
    return _short(getattr(error, "problem", None) or str(error))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON_CHARS else text[: _MAX_REASON_CHARS - 3] + "..."


class ChunkRenderer:
    """(start, stop) rows of a part -> one ``EncodedTask`` for each template."""

    def __init__(self, part: Part, settings: RenderingSettings, encoder):
        self.part, self.settings, self.encoder = part, settings, encoder

    def __call__(self, bounds: tuple[int, int]) -> list[EncodedTask]:
        templates = self.part.templates
        examples: list[list[dict]] = [[] for _ in templates]
        dropped: list[dict[str, Dropped]] = [{} for _ in templates]
        noted: list[dict[str, Dropped]] = [{} for _ in templates]
        for number, split, row, problem in self.part.rows(*bounds):
            if row is not None and "answer_choices" not in row:
                row = ProtectedRow(row)
            for i, template in enumerate(templates):
                try:
                    if row is None:
                        raise Problem(*problem.split(": ", 1))
                    example = make_example(template, row, number, split, self.settings)
                except Problem as found:
                    _count(dropped[i], found.reason, self._where(template, number, found.detail))
                    continue
                if example["answer_choices"] is not None and example["label"] is None:
                    detail = f"{example['target']!r} is not in {example['answer_choices']}"
                    where = self._where(template, number, _short(detail))
                    _count(noted[i], "answer not among the choices (kept)", where)
                examples[i].append(example)
        return [
            EncodedTask(self.encoder(found), dropped[i], noted[i])
            for i, found in enumerate(examples)
        ]

    def _where(self, template: PromptTemplate, number: int, detail: str) -> str:
        name = name_of(self.part.dataset, self.part.subset)
        return f"{name}, {template.name!r}, row {number}{': ' if detail else ''}{detail}"


def _count(table: dict[str, Dropped], reason: str, where: str) -> None:
    earlier = table.get(reason)
    table[reason] = Dropped(earlier.count + 1, earlier.first) if earlier else Dropped(1, where)


class JsonlEncoder:
    """Examples -> lines, the length of each, and its source row."""

    def __call__(self, examples: list[dict]) -> tuple[bytes, np.ndarray, np.ndarray]:
        dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        lines = [dumps(example).encode("utf-8", "replace") + b"\n" for example in examples]
        sizes = np.fromiter(map(len, lines), np.int64, len(lines))
        rows = np.fromiter((example["row"] for example in examples), np.int32, len(examples))
        return b"".join(lines), sizes, rows


class FairseqEncoder:
    """Examples -> ids and sizes of sources, ids and sizes of targets.

    As text for pretraining: normalised, no ``<s>``, ``</s>`` at the end.
    """

    def __init__(self, vocabulary: Vocabulary, lower: bool, dtype: np.dtype):
        self.vocabulary, self.lower, self.dtype = vocabulary, lower, dtype
        self._targets: dict[str, list[int]] = {}

    def __call__(self, examples: list[dict]):
        sources = self._encode([example["input"] for example in examples])
        targets = [example["target"] for example in examples]
        new = [text for text in dict.fromkeys(targets) if text not in self._targets]
        if len(self._targets) + len(new) > _CACHED_TARGETS:
            self._targets.clear()
            new = list(dict.fromkeys(targets))
        self._targets.update(zip(new, self._encode(new), strict=True))  # labels repeat
        return *self._packed(sources), *self._packed([self._targets[text] for text in targets])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        items = self.vocabulary.encode_lines([normalize_text(text, self.lower) for text in texts])
        for item in items:
            item.append(EOS_ID)
        return items

    def _packed(self, items: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        sizes = np.fromiter(map(len, items), np.int32, len(items))
        ids = np.fromiter(chain.from_iterable(items), self.dtype, int(sizes.sum()))
        return ids, sizes
