"""Rows of jsonl and JSON files: random access by offsets, without reading the file into memory.

JSON is not read by the package ``datasets``, which gives all rows of a file one schema: it makes
dates of texts like ``2020-01-01``, adds the fields that a row lacks, and ends at a broken line.
Here every value stays as it is written, and a broken row costs itself alone.
"""

import codecs
import json
import mmap
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from metro.utils.characters import refuse_utf16
from metro.utils.messages import UserError

_JSON_MARKS = re.compile(rb'"(?:[^"\\]++|\\[\s\S])*+"|[\[\]{}]')


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
    """Rows of a jsonl file, or of a ``.json`` file that holds a list of objects, as dicts.

    Only the path and the offsets are pickled: each process opens the file itself. A malformed line
    raises ``UnusableRow`` when it is read, not when the file is opened.

    Args:
        path: the file.
        limit: number of rows to keep, from the first.
        rename, derive: fields to rename and to add, see :func:`with_names`.
    """

    def __init__(
        self,
        path: str | Path,
        limit: int | None = None,
        rename: Mapping[str, str] | None = None,
        derive: Mapping[str, dict] | None = None,
    ):
        self.path, self.rename, self.derive = Path(path), rename or {}, derive or {}
        refuse_utf16(self.path)
        self.offsets = self._find_offsets()
        if limit is not None:
            self.offsets = self.offsets[: max(0, limit) + 1]
        self._file = None

    def _find_offsets(self):
        return _row_offsets(self.path)

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
        if not 0 <= start < end <= int(self.offsets[-1]):
            raise UserError(f"the offsets of {self.path} are damaged at row {index}: make it again")
        self._file.seek(start)  # stays within the buffer if rows are read in order
        where = f"{self.path}, row {index}"
        content = self._file.read(end - start)
        if self.path.suffix == ".json":  # what separates the objects of a list
            content = content.rstrip(b", \t\r\n")
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UnusableRow("unreadable row", f"not JSON: {error}", where) from None
        if not isinstance(row, dict):
            raise UnusableRow("unreadable row", "not a JSON object", where)
        return with_names(row, self.rename, self.derive)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def with_names(row: dict, rename: Mapping[str, str], derive: Mapping[str, dict]) -> dict:
    """Give a row the fields that the templates of its dataset read.

    Args:
        row: changed in place.
        rename: field of the templates -> field in the row.
        derive: new field -> ``{"from": field, "values": [value for 0, value for 1, ...]}``.
    """
    for name, name_there in rename.items():
        if name_there in row and name not in row:
            row[name] = row.pop(name_there)
    for name, rule in derive.items():
        value = row.get(rule["from"])
        if name not in row and isinstance(value, int) and 0 <= value < len(rule["values"]):
            row[name] = rule["values"][value]
    return row


def _row_offsets(path: Path):
    """Find the offsets of all rows and the end of the last, int64."""
    import numpy as np

    if path.suffix == ".json" and not _is_jsonl(path):
        return np.array(_list_offsets(path))
    offsets, end = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                offsets.append(end)
            end += len(line)
    offsets.append(end)
    return np.array(offsets)


def _is_jsonl(path: Path) -> bool:
    """Tell whether a ``.json`` file has one object per line, as ``datasets`` writes it."""
    with path.open("rb") as file:
        if file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return False  # a whole list may be one line, too long to be read at once
        file.seek(0)
        lines = (line for line in file if not line.isspace())
        first = next(lines, b"")
        try:
            row = json.loads(first or b"{}")
        except (ValueError, RecursionError):
            return False
        if not isinstance(row, dict):
            return False
        return next(lines, None) is not None or not any(isinstance(v, list) for v in row.values())


def _list_offsets(path: Path) -> array:
    """Find the objects of the list that a JSON file holds, at the top or as its only list.

    Raises:
        UserError: there is no such list, or the file was cut.
    """
    starts, end, depth, lists, top = array("q"), 0, 0, 0, b""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in _JSON_MARKS.finditer(content):
            mark = match.group()
            if mark in (b"[", b"{"):
                top = top or mark
                level = 1 if top == b"[" else 2
                lists += mark == b"[" and depth == level - 1
                if mark == b"{" and depth == level:
                    starts.append(match.start())
                depth += 1
            elif mark in (b"]", b"}"):
                depth -= 1
                if mark == b"}" and depth == level:
                    end = match.end()
    if depth:
        raise UserError(f"{path} is not complete JSON: it ends inside a list or object")
    if lists != 1 or not starts:
        raise UserError(
            f"{path} has no rows: write one JSON object per line, or one list of objects"
        )
    starts.append(end)
    return starts
