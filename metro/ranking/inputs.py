"""Rows to rank: from a file, a folder of splits, or a dataset of the hub."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metro.data.own_rows import OwnData, check_fields, fields_of
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
        if not path.stat().st_size:
            raise UserError(f"{path} has no rows")
        return read_lines(path)
    data = OwnData(settings.input, settings.subset, texts=(settings.text or "text",))
    rows = data.rows(data.choose(settings.split))
    check_fields(rows, [settings.text, settings.options_field], settings.input)
    is_plain = not (settings.text or settings.template or settings.prompt)
    if is_plain and "text" not in (known := fields_of(rows) or ["text"]):
        raise UserError(
            f"which field of {settings.input} is the text? --text one of {shortened(known)}"
        )
    return rows


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
