"""Rows of one's own and their splits: a file, a folder of splits, or a dataset of the hub.

A split is a file of the folder, or the rows whose field names it. Where nothing is for validation,
a share of the training rows is drawn for it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metro.data.datasets import DatasetUnavailable, available_splits, load_rows
from metro.data.jsonl_rows import UnusableRow
from metro.data.local_files import (
    READABLE,
    TableRows,
    describe,
    find_split,
    kind_of,
    open_rows,
    splits_in,
)
from metro.utils.messages import UserError, shortened

WHOLE = ""
"""The split of a single file."""
ROWS_READ_AT_ONCE = 1000


class OwnData:
    """Rows by their split, opened when they are asked for.

    Args:
        data: a file, a folder of splits or of ``save_to_disk``, or the name of a dataset.
        subset: of a dataset of the hub.
        split_field: field of the rows that names their split.
        texts: columns of csv that are text although all their cells are numbers.

    Raises:
        UserError: there is no such data.
    """

    def __init__(
        self,
        data: str | Path,
        subset: str | None = None,
        split_field: str | None = None,
        texts: Sequence[str] = (),
    ):
        self.data, path = str(data), Path(data)
        if subset and path.exists():
            raise UserError(f"{path} has no subset {subset!r}: leave it out")
        self.places = [path]
        self.name = path.resolve().name
        self._open: dict[str, Callable[[], Sequence[dict]]]
        if path.is_dir() and kind_of(path) is None:
            found = splits_in(path)
            if not found:
                raise UserError(f"{path} has no rows ({describe(path)}): rows come from {READABLE}")
            self.places = [file for files in found.values() for file in files]
            self._open = {
                name: partial(open_rows, files, texts=texts) for name, files in found.items()
            }
        elif path.exists():
            self.name = Path(self.name.removesuffix(".gz")).stem
            self._open = {WHOLE: partial(open_rows, path, texts=texts)}
        elif path.suffix or self.data.startswith((".", "/", "~")):
            raise UserError(f"there is no file {path}")
        else:
            self.places = []
            names = _from_hub(available_splits, self.data, subset)
            self._open = {
                name: partial(_from_hub, load_rows, self.data, subset, name) for name in names
            }
        if split_field:
            self._open = self._by_field(split_field)

    def _by_field(self, field: str) -> dict[str, Callable[[], Sequence[dict]]]:
        rows = self.rows(self.choose(None))
        check_fields(rows, [field], self.data)
        numbers: dict[str, list[int]] = {}
        for number, value in enumerate(values_of(rows, field)):
            numbers.setdefault(str(value), []).append(number)
        return {name: partial(ChosenRows, rows, chosen) for name, chosen in numbers.items()}

    def local_files(self) -> list[Path]:
        """List the files that the rows are read from."""
        below = (sorted(place.rglob("*")) or [place] for place in self.places)
        return [path for paths in below for path in paths if path.is_file()]

    @property
    def splits(self) -> list[str]:
        """Names of the splits; `WHOLE` alone of a single file."""
        return list(self._open)

    def rows(self, split: str) -> Sequence[dict]:
        """Open the rows of a split."""
        return self._open[split]()

    def find(self, *names: str) -> str | None:
        """Find the first of some splits, by any of its names."""
        found = (find_split(dict.fromkeys(self._open, []), name) for name in names)
        return next(filter(None, found), None)

    def choose(
        self, wanted: str | None, *usual: str, remedy: str = "choose one with --split"
    ) -> str:
        """Find the split that is wanted; else the first of the usual ones, or the only one.

        Args:
            wanted: its name.
            usual: names to look for where none is wanted.
            remedy: for the message.

        Raises:
            UserError: there is no such split, or nothing says which.
        """
        found = self.find(wanted) if wanted else self.find(*usual)
        if found is None and not wanted and len(self._open) == 1:
            return self.splits[0]
        if found is None and self.splits == [WHOLE]:
            raise UserError(f"{self.data} is a single file and has no split {wanted!r}")
        if found is None:
            known = shortened(sorted(self._open))
            missing = f"has no split {wanted!r}, but" if wanted else "has the splits"
            raise UserError(f"{self.data} {missing} {known}: {remedy}")
        return found


def _from_hub(read: Callable, *names: str | None) -> Any:
    """Read something of a dataset, with the remedy of own rows where it is not available."""
    try:
        return read(*names)
    except DatasetUnavailable as error:
        remedy = ", or give a file or folder of rows" if error.remedy else ""
        raise UserError(f"{error.problem}{remedy}") from None


class ChosenRows(Sequence):
    """Some of the rows, by their numbers."""

    def __init__(self, rows: Sequence[dict], numbers: Sequence[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ChosenRows(self.rows, self.numbers[index])
        return self.rows[self.numbers[index]]


def drawn_apart(
    rows: Sequence[dict], share: float, seed: int
) -> tuple[Sequence[dict], Sequence[dict]]:
    """Draw a share of the rows, at least one, and return the others and these."""
    order = np.random.default_rng(seed).permutation(len(rows))
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    first, second = sorted(order[count:].tolist()), sorted(order[:count].tolist())
    return ChosenRows(rows, first), ChosenRows(rows, second)


def read_rows(
    rows: Sequence[dict], indices: Sequence[int]
) -> Iterator[tuple[int, dict | UnusableRow]]:
    """Read numbered rows; of a jsonl file one by one, so that a broken line costs itself alone."""
    is_run = indices and indices[-1] - indices[0] + 1 == len(indices)
    if is_run and isinstance(rows, TableRows):  # one read of a table costs less than many
        yield from zip(indices, rows[indices[0] : indices[-1] + 1], strict=True)
        return
    for index in indices:
        try:
            yield index, rows[index]
        except UnusableRow as error:
            yield index, error


def all_rows(rows: Sequence[dict]) -> Iterator[dict | UnusableRow]:
    """Read every row, some of them at a time."""
    for start in range(0, len(rows), ROWS_READ_AT_ONCE):
        for _, row in read_rows(rows, range(start, min(start + ROWS_READ_AT_ONCE, len(rows)))):
            yield row


def values_of(rows: Sequence[dict], field: str) -> Iterator[Any]:
    """Yield a field's value in every row; None where there is none, or no row that can be read."""
    for row in all_rows(rows):
        yield None if isinstance(row, UnusableRow) else row.get(field)


def fields_of(rows: Sequence[dict]) -> list[str]:
    """Return the names of the first rows' fields, sorted; none where none can be read."""
    first = read_rows(rows, range(min(len(rows), ROWS_READ_AT_ONCE)))
    return sorted({name for _, row in first if not isinstance(row, UnusableRow) for name in row})


def check_fields(rows: Sequence[dict], fields: Sequence[str | None], data: str) -> None:
    """Refuse fields that none of the first rows has.

    Args:
        rows: opened from ``data``.
        fields: their names; None is none.
        data: for the message.

    Raises:
        UserError: one is not there, or there is no row.
    """
    if not len(rows):
        raise UserError(f"{data} has no rows")
    known = fields_of(rows)
    for name in fields:
        if name is not None and known and name not in known:
            raise UserError(f"{data} has no field {name!r}: it has {shortened(known)}")
