"""One row and one template make one prompted example: ``make_example``.

It is the only way to an example: ``metro prepare-prompts``, ``metro evaluate`` and ``metro prompts
show`` call it. An example depends on its row, its template and the settings alone, so the same row
gives the same prompt in all of them, also where the template draws at random.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple, NotRequired, TypedDict

from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.instruction import NO_INSTRUCTION, Flipped, flip
from metro.data.prompts.labels import NO_LABEL, OUT_OF_RANGE
from metro.data.prompts.limits import CUT_CHARS, TemplateError
from metro.data.prompts.templates import PromptTemplate, RenderedExample
from metro.utils.characters import bad_character_in

VALUE_CUT = f"value cut at {CUT_CHARS} characters, as published"
_MAX_DETAIL_CHARS = 160
_DRAWS = re.compile(r"\|\s*(?:choice|random)\b")


class ExampleSettings(NamedTuple):
    """Settings that decide what the examples are."""

    seed: int = 0
    """Seed of Jinja's ``choice``."""
    instruction_text: str = "published"
    """FLIPPED's instruction: ``published`` or ``rendered``, see ``instruction.py``."""
    fold_whitespace: bool = False
    """Fold white space to single blanks in prompt, answer and answer choices."""
    needs_choices: bool = False
    """Leave out rows that ask for no choice (`check_choices`); else any text may be an answer."""
    with_instruction: bool = True
    """Fill in the fields of FLIPPED."""


class PromptedExample(TypedDict):
    """A prompted example, and the fields of a line of jsonl (``stored.py``)."""

    task: str
    dataset: str
    subset: str | None
    prompt_name: str
    split: str
    row: int
    input: str
    target: str
    answer_choices: list[str] | None
    label: int | None
    """Index of the target among the answer choices."""
    flipped_input: str | None
    instruction: str | None
    cut: NotRequired[bool]
    """True where a value of the row was cut, see ``VALUE_CUT``; else not there."""


def make_example(
    template: PromptTemplate, row: dict, split: str, index: int, settings: ExampleSettings
) -> PromptedExample:
    """Make the example of a row under a template: render, check, fold white space.

    Args:
        template: the prompt template.
        row: fields of the dataset's row.
        split: the dataset's split.
        index: number of the row in the split.
        settings: the seed, and the rules of what an example must have.

    Raises:
        UnusableRow: the template gives this row no example.
    """
    seed = example_seed(settings.seed, template, split, index)
    try:
        rendered = template.render(row, seed=seed)
    except TemplateError as error:
        raise UnusableRow(error.reason, error.problem) from None
    target = _check(rendered, settings.needs_choices)
    flipped = _flip(template, row, rendered, seed, settings)
    fold = _fold if settings.fold_whitespace else str
    choices = rendered.choices
    example = PromptedExample(
        task=template.task_name,
        dataset=template.dataset,
        subset=template.subset,
        prompt_name=template.name,
        split=split,
        row=index,
        input=fold(rendered.input),
        target=fold(target),
        answer_choices=None if choices is None else [fold(choice) for choice in choices],
        label=rendered.label,
        flipped_input=flipped.input if flipped else None,
        instruction=flipped.instruction if flipped else None,
    )
    if rendered.is_cut:
        example["cut"] = True
    if found := bad_character_in(example.values()):
        raise UnusableRow(f"text with {found}", f"prompt {rendered.input!r}")
    return example


def example_seed(seed: int, template: PromptTemplate, split: str, index: int) -> int:
    """Return the seed of Jinja's ``choice`` for one row of a split under one template."""
    if not _DRAWS.search(template.jinja + (template.answer_choices or "")):
        return 0  # nothing is drawn
    name = (seed, template.dataset, template.subset, template.name, split, index)
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest(), "little")


def _check(rendered: RenderedExample, needs_choices: bool) -> str:
    """Return the target of a complete rendering."""
    target, choices = rendered.target, rendered.choices
    if rendered.missing:
        fields = ", ".join(map(repr, rendered.missing))
        raise UnusableRow("missing field", f"the row has no {fields}")
    if rendered.unlabelled:
        raise UnusableRow(NO_LABEL, ", ".join(rendered.unlabelled))
    if target is None:
        raise UnusableRow("no answer part", "the template gives this row no `|||`")
    if choices and rendered.label is None and target == "-1":
        raise UnusableRow(NO_LABEL, "the answer is -1")
    if not target.strip():
        raise UnusableRow("empty target")
    if not rendered.input.strip():
        raise UnusableRow("empty input")
    if needs_choices:
        check_choices(choices, rendered.label, target)
    return target


def check_choices(choices: Sequence[str] | None, label: int | None, target: str = "") -> int:
    """Check that there are different answer choices; return the number of the right one.

    A row with one choice, once or repeated, asks nothing: every model would be right about it, and
    FLIPPED has no wrong answer to learn from.

    Raises:
        UnusableRow: a choice is empty, all are the same, or none is the right one.
    """
    if not choices:
        raise UnusableRow("no answer choices")
    if label is None:
        raise UnusableRow("answer not among the choices", f"{target!r} is not in {list(choices)}")
    if not 0 <= label < len(choices):
        raise UnusableRow(OUT_OF_RANGE, f"{label} of {list(choices)}")
    if not all(choice.strip() for choice in choices):
        raise UnusableRow("empty answer choice", repr(list(choices)))
    if len(set(choices)) < 2:
        raise UnusableRow("a single answer choice", repr(list(choices)))
    return label


def _flip(
    template: PromptTemplate,
    row: dict,
    rendered: RenderedExample,
    seed: int,
    settings: ExampleSettings,
) -> Flipped | None:
    """Return the fields of FLIPPED; None where they are not wanted or not available."""
    if rendered.label is None or not settings.with_instruction:
        return None
    try:
        return flip(template, row, instruction_text=settings.instruction_text, seed=seed)
    except (UnusableRow, TemplateError) as error:
        if settings.needs_choices:
            detail = error.detail if isinstance(error, UnusableRow) else error.problem
            raise UnusableRow(NO_INSTRUCTION, detail) from None
        return None


def _fold(text: str) -> str:
    return " ".join(text.split())


class LeftOut(NamedTuple):
    """Rows left out (or kept with a flaw) for one reason."""

    num_rows: int
    first: str
    """Place of the first one, and the value at fault."""


def count_row(table: dict[str, LeftOut], error: UnusableRow, where: str) -> None:
    """Add a row to the counts, by its reason; ``where`` names the row."""
    if earlier := table.get(error.reason):
        table[error.reason] = LeftOut(earlier.num_rows + 1, earlier.first)
        return
    detail = " ".join(error.detail.split())
    if len(detail) > _MAX_DETAIL_CHARS:
        detail = detail[: _MAX_DETAIL_CHARS - 3] + "..."
    table[error.reason] = LeftOut(1, ": ".join(filter(None, (where, detail))))
