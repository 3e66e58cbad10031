"""Prepared prompts on disk: read them, and write them resumably.

jsonl: ``<side>/<task>/<side>.jsonl`` holds one example per line, with the fields of
``PromptedExample`` (``examples.py``). ``<side>.offsets.npy`` (int64) holds the byte offsets of the
lines and the end of the file, ``<side>.rows.npy`` (int32) the source row of each example,
ascending. Everything is read through the page cache: a folder of any size opens at once and costs
no memory per process.

fairseq: ``<side>/<task>/<side>.src-tgt.{src,tgt}.{bin,idx}`` as the original's task reads them,
beside ``<side>/data_cap.json`` and ``valid/valid_datasets.json``.

For each format an encoder makes examples into a payload (in worker processes), and a writer appends
payloads to the files of a task.
"""

import contextlib
import json
import os
import shutil
import tokenize
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from metro.data.indexed_file import IndexedFileWriter, WritePosition, best_dtype, open_at
from metro.data.jsonl_rows import JsonlRows, UnusableRow
from metro.data.prepared_folder import PROMPTS_MANIFEST, PreparedFolder
from metro.data.prompts.examples import PromptedExample
from metro.modeling.text_metro_t5 import Vocabulary
from metro.utils.files import inside, link, read_json
from metro.utils.messages import UserError

_HEADER_BYTES = 128  # of an .npy file with one axis: NumPy leaves room for a longer one
_CACHED_TARGETS = 4096
_INT64, _INT32 = np.dtype("<i8"), np.dtype("<i4")
_NULL = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("input", "target"), (str,)),
    **dict.fromkeys(("flipped_input", "instruction"), (str, _NULL)),
    **{"row": (int,), "label": (int, _NULL), "answer_choices": (list, _NULL)},
}
"""Of the fields of an example."""


class PromptedExamples(JsonlRows):
    """The examples of one jsonl file, as dicts. Picklable; every process opens the file itself.

    Args:
        source: the jsonl file, or a folder that holds exactly one.
    """

    def __init__(self, source: str | Path):
        path = Path(source)
        if path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if len(files) != 1:
                raise UserError(
                    f"{path} holds {len(files)} jsonl files where one is expected: give the "
                    "folder of a single task, as `metro prepare-prompts` writes it"
                )
            path = files[0]
        if not path.is_file():
            raise UserError(f"no file {path}: make it with `metro prepare-prompts`")
        super().__init__(path)
        if int(self.offsets[-1]) != path.stat().st_size:
            raise UserError(
                f"{path} does not end where {self._beside('offsets').name} says: prepare it again"
            )

    def __getitem__(self, index):
        """Read an example, or those of a slice.

        Raises:
            UnusableRow: a field is of another kind, or label and target contradict each other.
        """
        example = super().__getitem__(index)
        if isinstance(example, dict):
            _check_example(example)
        return example

    def _find_offsets(self):
        offsets = self._beside("offsets")
        if offsets.is_file():
            return _numbers(offsets)
        return super()._find_offsets()  # a file that somebody wrote by hand

    def _beside(self, what: str) -> Path:
        return self.path.with_suffix(f".{what}.npy")

    @property
    def rows(self):
        """Source row of each example, int32, ascending."""
        path = self._beside("rows")
        if path.is_file():
            return _numbers(path)
        return np.array([example["row"] for example in self], np.int32)

    def __reduce__(self):  # the offsets are mapped again, not copied
        return type(self), (self.path,)


def _check_example(example: dict) -> None:
    for name in _KINDS.keys() & example.keys():
        value, kinds = example[name], _KINDS[name]
        is_right = isinstance(value, kinds) and not isinstance(value, bool)
        if isinstance(value, list):
            is_right = is_right and all(isinstance(choice, str) for choice in value)
        if not is_right:
            raise UnusableRow("not a prepared example", f"{name} is {value!r}")
    choices, label = example.get("answer_choices"), example.get("label")
    if choices and label is not None and (target := example.get("target")) in choices:
        if choices[label : label + 1] != [target]:
            detail = f"{label} is not that of {target!r} in {choices}"
            raise UnusableRow("label of another answer choice than the target", detail)


def _numbers(path: Path) -> np.ndarray:
    """Map the numbers that are stored beside the examples."""
    try:
        numbers = np.load(path, mmap_mode="r")
        if numbers.ndim == 1 and numbers.dtype.kind == "i":
            return numbers
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError):  # of another kind, or cut
        pass
    raise UserError(f"{path} is damaged: prepare the folder again with `metro prepare-prompts`")


def files_of(side: str) -> tuple[str, str, str]:
    """Names of the files of a task: its examples, their offsets and their source rows."""
    return f"{side}.jsonl", f"{side}.offsets.npy", f"{side}.rows.npy"


def read_manifest(folder: str | Path) -> dict:
    """Read the manifest of a folder that `metro prepare-prompts` made.

    Raises:
        UserError: it is not such a folder, or not complete.
    """
    path = Path(folder) / PROMPTS_MANIFEST
    manifest = read_json(path)
    if manifest is None:
        raise UserError(
            f"{folder} is not a folder of prepared prompts (it has no {PROMPTS_MANIFEST}): make "
            "one with `metro prepare-prompts --mixture M --out DIR`"
        )
    try:
        manifest["splits"]["train"], manifest["format"], manifest["mixture"]
        for tasks in manifest["splits"].values():
            for task, facts in tasks.items():
                inside(Path(folder), task)
                texts = [facts["dataset"], facts["prompt_name"]]
                texts += [] if facts["subset"] is None else [facts["subset"]]
                numbers = [facts["num_examples"] + 1]
                numbers += [] if facts["cap"] is None else [facts["cap"]]
                if not all(isinstance(text, str) for text in texts) or not all(
                    isinstance(number, int) and number > 0 for number in numbers
                ):
                    raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not the manifest that `metro prepare-prompts` writes: it is damaged; "
            "prepare the folder again"
        ) from None
    return manifest


def encode_jsonl(examples: Sequence[PromptedExample]) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Examples -> lines, the length of each, and its source row."""
    dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    lines = [dumps(example).encode() + b"\n" for example in examples]
    sizes = np.fromiter(map(len, lines), np.int64, len(lines))
    rows = np.fromiter((example["row"] for example in examples), np.int32, len(examples))
    return b"".join(lines), sizes, rows


class JsonlTaskWriter:
    """Writes ``<side>.jsonl`` with offsets and source rows beside it."""

    def __init__(self, folder: Path, side: str, position: list[int] | None):
        self.num_examples, self.num_bytes = position or (0, 0)
        self._files = []
        sizes = (
            self.num_bytes,
            _HEADER_BYTES + self.num_examples * _INT64.itemsize,
            _HEADER_BYTES + self.num_examples * _INT32.itemsize,
        )
        for name, size in zip(files_of(side), sizes, strict=True):
            path = folder / name
            if not position:
                path.write_bytes(bytes(size))  # room for a header
            self._files.append(open_at(path, size))

    @property
    def position(self) -> list[int]:
        return [self.num_examples, self.num_bytes]

    def append(self, payload: tuple) -> None:
        lines, sizes, rows = payload
        starts = self.num_bytes + np.cumsum(sizes) - sizes
        for file, content in zip(
            self._files,
            (lines, starts.astype(_INT64).tobytes(), rows.astype(_INT32).tobytes()),
            strict=True,
        ):
            file.write(content)
        self.num_examples += len(sizes)
        self.num_bytes += len(lines)

    def flush(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close; what was not flushed may be lost, as where the disk is full."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def finish(self) -> None:
        _, offsets, rows = self._files
        offsets.write(np.array([self.num_bytes], _INT64).tobytes())
        for file, dtype, count in ((offsets, _INT64, 1), (rows, _INT32, 0)):
            file.seek(0)
            shape = (self.num_examples + count,)
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == _HEADER_BYTES
        self.flush()
        self.close()


class FairseqEncoder:
    """Examples -> ids and sizes of sources, ids and sizes of targets, as text for pretraining."""

    def __init__(self, vocabulary: Vocabulary, lower: bool):
        self.vocabulary, self.lower = vocabulary, lower
        self.dtype = best_dtype(len(vocabulary))
        self._targets: dict[str, list[int]] = {}

    def __call__(self, examples: Sequence[PromptedExample]) -> tuple[np.ndarray, ...]:
        sources = self.vocabulary.encode_texts([x["input"] for x in examples], self.lower)
        targets = [example["target"] for example in examples]
        new = [text for text in dict.fromkeys(targets) if text not in self._targets]
        if len(self._targets) + len(new) > _CACHED_TARGETS:
            self._targets.clear()
            new = list(dict.fromkeys(targets))
        encoded = self.vocabulary.encode_texts(new, self.lower)
        self._targets.update(zip(new, encoded, strict=True))  # labels repeat
        return *self._packed(sources), *self._packed([self._targets[text] for text in targets])

    def _packed(self, items: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        sizes = np.fromiter(map(len, items), np.int32, len(items))
        ids = np.fromiter(chain.from_iterable(items), self.dtype, int(sizes.sum()))
        return ids, sizes


class FairseqTaskWriter:
    """Writes sources and targets in fairseq's memory-mapped format."""

    def __init__(self, folder: Path, side: str, position: list[int] | None, dtype: np.dtype):
        position = position or [0, 0, 0, 0]
        self._writers = [
            IndexedFileWriter(folder / f"{side}.src-tgt.{end}", dtype, WritePosition(*place))
            for end, place in (("src", position[:2]), ("tgt", position[2:]))
        ]

    @property
    def num_examples(self) -> int:
        return self._writers[0].num_items

    @property
    def position(self) -> list[int]:
        return [number for writer in self._writers for number in writer.position]

    def append(self, payload: tuple) -> None:
        self._writers[0].append(*payload[:2])
        self._writers[1].append(*payload[2:])

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def finish(self) -> None:
        for writer in self._writers:
            writer.finish()


class PromptFolder(PreparedFolder):
    """``OUT`` and ``OUT.partial`` of ``prepare-prompts``."""

    def __init__(self, out: Path, settings: dict):
        super().__init__(out, settings, PROMPTS_MANIFEST, "metro prepare-prompts")

    def task_folder(self, side: str, task: str) -> Path:
        folder = self.partial / side / task
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_task(self, side: str, task: str) -> None:
        shutil.rmtree(self.partial / side / task, ignore_errors=True)

    def write_fairseq_tables(self, splits: dict[str, dict], groups: dict[str, list[str]]) -> None:
        """Write what the original's task reads beside the data; dictionaries are linked."""
        for side, tasks in splits.items():
            (self.partial / side).mkdir(exist_ok=True)
            caps = {task: facts["cap"] for task, facts in tasks.items()}
            (self.partial / side / "data_cap.json").write_text(json.dumps(caps, indent=4))
            link(self.partial / "dict.txt", self.partial / side / "dict.txt")
            for task in tasks:
                for end in ("src", "tgt"):
                    target = self.partial / side / task / f"dict.{end}.txt"
                    link(self.partial / "dict.txt", target)
        (self.partial / "valid" / "valid_datasets.json").write_text(json.dumps(groups, indent=4))
