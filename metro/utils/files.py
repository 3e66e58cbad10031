"""Folders and files that are complete, or not there.

Everything is written beside its place under a hidden name, flushed to the disk, and moved into
place at the end. A process that is killed leaves such a hidden folder behind, which the next call
for the same place removes.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metro.utils.messages import UserError

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_output(out: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse a place that is taken, or whose replacement would take more than an export away.

    Args:
        out: folder or file to write.
        overwrite: it may be there already.
        inputs: what is read to write it.

    Raises:
        UserError: there is something already, or replacing it would not be safe.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{out} exists: choose another name, or replace it with --overwrite")
    place = out.resolve()
    if place.is_dir():
        below = [path for path in (Path.cwd(), *inputs) if path.resolve().is_relative_to(place)]
        folders = sorted(path.name for path in place.iterdir() if path.is_dir())
        if below or folders:
            what = below[0] if below else f"the folder {folders[0]}"
            raise UserError(
                f"{out} is not replaced, as {what} lies in it and would be lost: choose another "
                "name"
            )
    elif place in [path.resolve() for path in inputs]:
        raise UserError(f"{out} is what is read: choose another name")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when the block ends without an error.

    With ``overwrite`` a folder that is there stays as it is until then.

    Raises:
        UserError: see :func:`check_output`.
    """
    check_output(out, overwrite, inputs)
    if out.is_file():
        raise UserError(f"{out} is a file: choose another name for the folder")
    out = out.resolve()  # a link stays, and what it leads to is replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.incomplete-"
    _remove_abandoned(out.parent, prefix)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # for as long as this process lives
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for path in temporary.rglob("*"):
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())
            flush(path)
        flush(temporary)
        if out.exists():
            check_output(out, overwrite, inputs)
            _exchange(temporary, out)
        else:
            os.rename(temporary, out)  # fails where somebody else has just made `out`
        flush(out.parent)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)  # incomplete, or what was replaced


@contextlib.contextmanager
def new_file(out: Path, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A file to write, which becomes ``out`` when the block ends without an error.

    Raises:
        UserError: see :func:`check_output`.
    """
    check_output(out, overwrite, inputs)
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file in it")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.incomplete-"
    _remove_abandoned(out.parent, prefix)
    lock, name = tempfile.mkstemp(prefix=prefix, dir=out.parent)
    temporary = Path(name)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.chmod(temporary, 0o666 & ~_umask())
        yield temporary
        flush(temporary)
        os.replace(temporary, out)
        flush(out.parent)
    finally:
        os.close(lock)
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a crash leaves the old or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any | None:
    """Content of a JSON file, None where there is no such file.

    Raises:
        UserError: it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not the JSON file that METRO wrote") from None


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """What processes that were killed have left; nobody holds its lock."""
    for path in parent.iterdir():
        if not path.name.startswith(prefix):
            continue
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # being written just now
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            os.close(lock)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, in one step where the system can: at every moment one of them is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(new), os.fsencode(old))
        if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), "cannot replace the folder", str(old))
    aside = new.with_name(f"{new.name}-previous")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
