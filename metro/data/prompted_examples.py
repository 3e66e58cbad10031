"""Prompted examples on disk: jsonl, with the places of its lines beside it.

``<task>/<split>.jsonl`` holds one example per line with the fields ``task, dataset, subset,
prompt_name, split, row, input, target, answer_choices, label, flipped_input, instruction``.
``<split>.offsets.npy`` (int64) holds the byte offsets of the lines and the end of the file,
``<split>.rows.npy`` (int32) the source row of each example, ascending. Everything is read through
the page cache: a folder of any size opens at once and costs no memory per process.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

MANIFEST = "prompts.json"


class PromptedExamples(Sequence):
    """The examples of one jsonl file, as dicts. Picklable; every process opens the file itself.

    Args:
        source: the jsonl file, or a folder that holds exactly one.
    """

    def __init__(self, source: str | Path):
        path = Path(source)
        if path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if len(files) != 1:
                raise ValueError(
                    f"{path} holds {len(files)} jsonl files where one is expected: give the "
                    "folder of a single task, as `metro prepare-prompts` writes it"
                )
            path = files[0]
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: make it with `metro prepare-prompts`")
        self.path = path
        self._open()

    def _open(self) -> None:
        import numpy as np

        offsets = self.path.with_suffix(".offsets.npy")
        if offsets.is_file():
            self.offsets = np.load(offsets, mmap_mode="r")
        else:  # a file that somebody wrote by hand
            from metro.data.datasets import JsonlRows

            self.offsets = JsonlRows(self.path).starts
        if int(self.offsets[-1]) != self.path.stat().st_size:
            raise ValueError(
                f"{self.path} does not end where {offsets.name} says: prepare it again"
            )
        self._file = self._process = None

    @property
    def rows(self):
        """int32, the source row of each example, ascending."""
        import numpy as np

        path = self.path.with_suffix(".rows.npy")
        if path.is_file():
            return np.load(path, mmap_mode="r")
        return np.array([example["row"] for example in self], np.int32)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} examples and none at {index}")
        index = int(index) % len(self)
        if self._process != os.getpid():  # a forked worker must not share the file's position
            self._file, self._process = self.path.open("rb"), os.getpid()
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        self._file.seek(start)
        return json.loads(self._file.read(end - start))

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        self._open()


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a folder that `metro prepare-prompts` made.

    Raises:
        ValueError: the folder is none, or not complete.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a folder of prepared prompts (it has no {MANIFEST}): make one with "
            "`metro prepare-prompts --mixture M --out DIR`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["splits"]["train"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not the manifest that `metro prepare-prompts` writes"
        ) from None
    return manifest
