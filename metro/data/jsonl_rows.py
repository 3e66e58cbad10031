"""Rows of a jsonl file: random access by line offsets, without reading the file into memory."""

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from metro.utils.characters import refuse_utf16
from metro.utils.messages import UserError


class UnusableRow(UserError):
    """A row from which an example cannot be made.

    Attributes:
        reason: the kind of failure; equal ones are counted together.
        detail: the value at fault.
    """

    def __init__(self, reason: str, detail: str = "", where: str = ""):
        super().__init__(": ".join(filter(None, (where, reason, detail))))
        self.reason, self.detail = reason, detail


class JsonlRows(Sequence):
    """Rows of a jsonl file, as dicts.

    Only the path and the offsets are pickled: each process opens the file itself. A malformed line
    raises ``UnusableRow`` when it is read, not when the file is opened.

    Args:
        path: the file.
        limit: number of rows to keep, from the first.
        derive: fields to add, see :func:`with_derived`.
    """

    def __init__(self, path: str | Path, limit: int | None = None, derive: dict | None = None):
        self.path, self.derive = Path(path), derive or {}
        refuse_utf16(self.path)
        self.offsets = self._find_offsets()
        if limit is not None:
            self.offsets = self.offsets[: max(0, limit) + 1]
        self._file = None

    def _find_offsets(self):
        return _line_offsets(self.path)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows and none at {index}")
        index = int(index) % len(self)
        if self._file is None or self._process != os.getpid():  # a forked worker opens its own
            self._file, self._process = self.path.open("rb"), os.getpid()
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        self._file.seek(start)  # stays within the buffer if rows are read in order
        where = f"{self.path}, row {index}"
        try:
            row = json.loads(self._file.read(end - start))
        except ValueError as error:
            raise UnusableRow("unreadable row", f"not JSON: {error}", where) from None
        if not isinstance(row, dict):
            raise UnusableRow("unreadable row", "not a JSON object", where)
        return with_derived(row, self.derive)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def with_derived(row: dict, derive: dict[str, dict]) -> dict:
    """Add the fields that templates for an older version of a dataset expect.

    Args:
        row: changed in place.
        derive: new field -> ``{"from": field, "values": [value for 0, value for 1, ...]}``.
    """
    for name, rule in derive.items():
        value = row.get(rule["from"])
        if name not in row and isinstance(value, int) and 0 <= value < len(rule["values"]):
            row[name] = rule["values"][value]
    return row


def _line_offsets(path: Path):
    """Find the offsets of all non-blank lines and the end of the file, int64."""
    import numpy as np

    offsets, end = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                offsets.append(end)
            end += len(line)
    offsets.append(end)
    return np.array(offsets)
