"""The one rule for characters that no text has: half characters (lone surrogates), NUL, UTF-16.

A row, line or record with one is left out, counted and named; a single text that a user gives is
refused. The commands differ only in what they leave out.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metro.utils.messages import UserError

HALF_CHARACTER, NUL = "half a character (lone surrogate)", "a NUL character"


def bad_character(text: str) -> str | None:
    """Name what makes a text unusable; None where nothing does.

    JSON that was cut inside an escaped pair (``"\\ud83d"``) and bytes that are not UTF-8 on a
    command line or in a pipe arrive as lone surrogates; UTF-16 read as UTF-8 is full of NUL.
    """
    if "\0" in text:
        return NUL
    try:
        text.encode()
    except UnicodeEncodeError:
        return HALF_CHARACTER
    return None


def bad_character_in(values: Iterable[Any]) -> str | None:
    """Name what makes one of the texts among ``values`` (or in lists there) unusable."""
    for value in values:
        found = None
        if isinstance(value, str):
            found = bad_character(value)
        elif isinstance(value, list | tuple):
            found = bad_character_in(value)
        if found:
            return found
    return None


def usable_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts that a user gave, each checked.

    Raises:
        UserError: one cannot be used; the message has its number and what is wrong with it.
    """
    for number, text in enumerate(texts, start=1):
        if found := bad_character(text):
            raise UserError(f"text {number} has {found}: {text[:80]!r}; write it as UTF-8 text")
        yield text


def refuse_utf16(path: Path) -> None:
    """Refuse a file that begins with the mark of UTF-16 or UTF-32.

    Raises:
        UserError: it does; the message has the command that converts it.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UserError(
            f"{path} is UTF-16 and not UTF-8: convert it, `iconv -f UTF-16 -t UTF-8 {path.name}`"
        )
