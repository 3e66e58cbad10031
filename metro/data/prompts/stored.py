"""Prompted examples on disk: jsonl, with the offsets of its lines beside it.

``<side>/<task>/<side>.jsonl`` holds one example per line, with the fields of ``PromptedExample``
(``examples.py``). ``<side>.offsets.npy`` (int64) holds the byte offsets of the lines and the end of
the file, ``<side>.rows.npy`` (int32) the source row of each example, ascending. Everything is read
through the page cache: a folder of any size opens at once and costs no memory per process.
"""

import json
from pathlib import Path

from metro.data.jsonl_rows import JsonlRows
from metro.data.prepared_folder import PROMPTS_MANIFEST
from metro.utils.messages import UserError


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

    def _find_offsets(self):
        import numpy as np

        offsets = self._beside("offsets")
        if offsets.is_file():
            return np.load(offsets, mmap_mode="r")
        return super()._find_offsets()  # a file that somebody wrote by hand

    def _beside(self, what: str) -> Path:
        return self.path.with_suffix(f".{what}.npy")

    @property
    def rows(self):
        """Source row of each example, int32, ascending."""
        import numpy as np

        path = self._beside("rows")
        if path.is_file():
            return np.load(path, mmap_mode="r")
        return np.array([example["row"] for example in self], np.int32)

    def __reduce__(self):  # the offsets are mapped again, not copied
        return type(self), (self.path,)


def read_manifest(folder: str | Path) -> dict:
    """Read the manifest of a folder that `metro prepare-prompts` made.

    Raises:
        UserError: it is not such a folder, or not complete.
    """
    path = Path(folder) / PROMPTS_MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} is not a folder of prepared prompts (it has no {PROMPTS_MANIFEST}): make "
            "one with `metro prepare-prompts --mixture M --out DIR`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["splits"]["train"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the manifest that `metro prepare-prompts` writes") from None
    return manifest
