"""Rows to rank: from a file, a folder of splits, or a dataset of the hub."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metro.data.datasets import available_splits, load_rows
from metro.data.jsonl_rows import UnusableRow
from metro.data.local_files import find_split, open_rows, splits_in
from metro.ranking.settings import RankSettings
from metro.utils.messages import UserError, shortened


def open_input(settings: RankSettings) -> Iterable[Any]:
    """Open the rows of ``settings.input``: dicts of fields, or lines of a ``.txt``.

    Raises:
        UserError: there is no such input, or it cannot be read.
    """
    if settings.input is None:
        raise UserError("no texts to rank: give them, or --input FILE")
    path = Path(settings.input)
    if path.suffix == ".txt":
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        return read_lines(path)
    rows: Sequence[dict]
    if path.is_dir() and not (path / "state.json").is_file():
        splits = splits_in(path)
        name = find_split(splits, settings.split) if settings.split else None
        if name is None and (settings.split or len(splits) != 1):
            found = shortened(sorted(splits)) or "no file of rows"
            raise UserError(f"{path} has {found}: choose one with --split")
        rows = open_rows(splits[name or next(iter(splits))])
    elif path.exists():
        rows = open_rows(path, texts=(settings.text or "text",))
    elif path.suffix or settings.input.startswith((".", "/", "~")):
        raise UserError(f"there is no file {path}")
    else:
        split = settings.split
        if split is None:
            known = available_splits(settings.input, settings.subset)
            if len(known) != 1:
                raise UserError(f"{path} has the splits {', '.join(known)}: choose with --split")
            [split] = known
        rows = load_rows(settings.input, settings.subset, split)
    check_fields(rows, settings)
    return rows


def check_fields(rows: Sequence[dict], settings: RankSettings) -> None:
    """Refuse fields that the first row does not have.

    Raises:
        UserError: one is not there, or none is said to hold the text.
    """
    try:
        first = rows[0] if len(rows) else {}
    except UnusableRow:
        return
    if not first:
        raise UserError(f"{settings.input} has no rows")
    known = shortened(sorted(first))
    for name in (settings.text, settings.options_field):
        if name is not None and name not in first:
            raise UserError(f"{settings.input} has no field {name!r}: it has {known}")
    is_plain = not (settings.text or settings.template or settings.prompt)
    if is_plain and "text" not in first:
        raise UserError(f"which field of {settings.input} is the text? --text one of {known}")


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file.

    Raises:
        UserError: it is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for line in lines:
                yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error}): write it again") from None


def each_row(rows: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows; an ``UnusableRow`` in the place of one that cannot be read."""
    if not isinstance(rows, Sequence):
        yield from rows
        return
    for number in range(len(rows)):
        try:
            yield rows[number]
        except UnusableRow as error:
            yield error
