"""Checksums of files that METRO wrote: a flipped bit may leave numbers that make sense.

A folder's record is a JSON object with ``{"files": {name: {"bytes", "crc32"}}}``: the manifest of
``prepare-text`` and ``prepare-prompts``, ``checksums.json`` of a model and of a checkpoint. JSON
files of METRO's own have the checksum of their content in themselves, see
:func:`metro.utils.files.sealed`.

Whoever reads a file checks it. Of large data only the smaller files are read for it, up to
``AT_START`` bytes; ``metro doctor FOLDER`` checks every byte.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from metro.utils.files import flush, inside, read_json, write_json
from metro.utils.messages import UserError

RECORD = "checksums.json"
RECORDS = (RECORD, "prepare_text.json", "prompts.json")
AT_START = 1 << 30
"""Bytes that are read for their checksums when a run starts, in less than a second."""


def facts(path: Path) -> dict:
    """Return the size and the CRC-32 of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def record(folder: Path, names: Iterable[str]) -> None:
    """Flush files of a folder to disk and write ``checksums.json``, which lists them."""
    files = {}
    for name in sorted({*names} - {RECORD}):
        flush(folder / name)
        files[name] = facts(folder / name)
    write_record(folder, files)


def write_record(folder: Path, files: Mapping[str, dict]) -> None:
    """Write ``checksums.json`` of files whose `facts` are known."""
    write_json(folder / RECORD, {"files": files}, seal=True)


def recorded(folder: Path) -> dict[str, dict]:
    """Return size and checksum of each file that the folder's record lists, if it has one.

    Raises:
        UserError: the record is damaged.
    """
    for path in (folder / name for name in RECORDS):
        if (content := read_json(path)) is not None:
            try:
                return {name: dict(content["files"][name]) for name in content.get("files", {})}
            except (TypeError, ValueError, AttributeError):
                raise UserError(f"{path} is damaged: copy the folder again") from None
    return {}


def damage(
    folder: Path, names: Iterable[str] | None = None, most_bytes: int | None = None
) -> Iterator[str]:
    """Yield what is wrong with files of a folder, a line for each; nothing without a record.

    Args:
        folder: made by METRO.
        names: files to check; all that the record lists by default.
        most_bytes: to read in all; larger files are checked by their size alone.

    Raises:
        UserError: the record is damaged.
    """
    files = recorded(folder)
    wanted = files if names is None else [name for name in names if name in files]
    for name in sorted(wanted, key=lambda name: files[name]["bytes"]):
        path, known = inside(folder, name), files[name]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            yield f"{path} is missing"
        elif size != known["bytes"]:
            yield f"{path} has {size} bytes instead of {known['bytes']}"
        elif "crc32" in known and (most_bytes is None or size <= most_bytes):
            most_bytes = None if most_bytes is None else most_bytes - size
            if facts(path)["crc32"] != known["crc32"]:
                yield f"{path} was damaged: its content is not what was written"


def check_archive(path: Path) -> None:
    """Compare every entry of a zip archive, as ``torch.save`` writes it, with its checksum.

    Raises:
        BadZipFile: it was cut, or an entry was damaged.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = []
        for entry in archive.infolist():
            try:
                with archive.open(entry) as content:
                    while content.read(1 << 22):
                        pass
            except zipfile.BadZipFile:
                damaged.append(entry.filename)
        if 0 < len(damaged) < len(archive.infolist()):  # all: written without checksums
            raise zipfile.BadZipFile(f"the checksum of its entry {damaged[0]} is another one")


def refuse_damage(
    folder: str | Path,
    names: Iterable[str] | None = None,
    *,
    remedy: str = "copy it again, or make it again",
    most_bytes: int | None = AT_START,
) -> None:
    """Raise a ``UserError`` for the first damaged file, see :func:`damage`."""
    for line in damage(Path(folder), names, most_bytes):
        raise UserError(f"{line}: {remedy}")
