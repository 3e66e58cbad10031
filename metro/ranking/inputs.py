"""Rows to rank: from a file, a folder of splits, or a dataset of the hub."""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from metro.data.own_rows import OwnData, check_fields, fields_of
from metro.ranking.questions import Questions
from metro.ranking.settings import RankSettings
from metro.utils.characters import refuse_utf16
from metro.utils.messages import UserError, shortened


def open_input(settings: RankSettings, questions: Questions) -> Sequence[Any]:
    """Open the rows of ``settings.input``: dicts of fields, or lines of a ``.txt``.

    Raises:
        UserError: there is no such input, it cannot be read, or has not what is asked about.
    """
    if settings.input is None:
        raise UserError("no texts to rank: give them, or --input FILE")
    path = Path(settings.input)
    if path.suffix == ".txt":
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        if not path.stat().st_size:
            raise UserError(f"{path} has no rows")
        if needed := questions.needed_fields(are_texts=True):
            raise UserError(f"{path} has lines and no fields; to read {shortened(needed)}: a csv")
        return TextLines(path)
    texts = filter(None, (settings.text or "text", questions.only_field))
    data = OwnData(settings.input, settings.subset, texts=(*texts,))
    rows = data.rows(data.choose(settings.split))
    check_fields(rows, [settings.text, settings.options_field], settings.input)
    if questions.is_default and not settings.text:
        if "text" not in (known := fields_of(rows) or ["text"]):
            raise UserError(
                f"which field of {settings.input} is the text? --text one of {shortened(known)}"
            )
    check_fields(rows, questions.needed_fields(are_texts=False), settings.input)
    return rows


class TextLines(Sequence):
    """Lines of a UTF-8 file, found by their offsets.

    Raises:
        UserError: it, or a line that is read, is not UTF-8.
    """

    def __init__(self, path: Path):
        refuse_utf16(path)
        self.path = path
        self._file = path.open("rb")
        self._offsets = array("q", accumulate(map(len, self._file), initial=0))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start, end = self._offsets[index], self._offsets[index + 1]
        self._file.seek(start)  # stays within the buffer if lines are read in order
        try:
            line = self._file.read(end - start).decode("utf-8" if start else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}, line {index + 1} is not UTF-8 ({error}): write it again"
            ) from None
        return line.rstrip("\r\n")
