"""One process at a time writes an output: the second one says who does.

The lock is the operating system's (POSIX ``fcntl``), so that it ends with its process, however that
ends, and holds between machines where a network file system passes locks on (NFS; Lustre mounted
with ``flock``). Its file names the holder for the message; left by a killed process, it locks
nothing. Where the file system has no locks, only processes of this machine see each other.

The processes of one run (``torchrun``) are one holder: its first process takes the lock.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from metro.utils.messages import UserError

INSIDE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO)
_held: set[Path] = set()
"""Files locked by this process, which POSIX locks do not keep from itself."""


@contextlib.contextmanager
def locked(out: Path, *, inside: bool = False) -> Iterator[None]:
    """Keep other processes from writing ``out`` while the block runs.

    Args:
        out: file or folder, which may not exist yet.
        inside: the lock lies in the folder, which is made, instead of beside it: for folders that
            stay while they are written, as their parent may be read-only.

    Raises:
        UserError: another process writes it; the message says which, where, and since when.
    """
    out = out.resolve()
    path = out / INSIDE if inside else out.with_name(f".{out.name}{INSIDE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path in _held:
        raise UserError(f"{out} is being written by this very process: wait until it is done")
    with _open_locked(path, out) as file:
        _held.add(path)
        try:
            with contextlib.suppress(OSError):  # a full disk: the name is a courtesy
                file.truncate(0)
                file.write(json.dumps(_this_process()))
                file.flush()
            yield
        finally:
            _held.discard(path)
            path.unlink(missing_ok=True)  # before the file is closed, which ends the lock


def _open_locked(path: Path, out: Path) -> IO[str]:
    """Open and lock a file that bears its name still: its last holder may have removed it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno not in _NO_LOCKS
            time.sleep(0.1 * held)  # a holder that has just locked it writes its name now
            holder = _read_holder(file)
            file.close()
            if held or _is_alive(holder):
                raise UserError(_describe(out, holder)) from None
            return path.open("a+", encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _this_process() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _read_holder(file: IO[str]) -> dict[str, Any]:
    try:
        file.seek(0)
        holder = json.loads(file.read())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Tell whether a process of this machine runs still."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    return Path(f"/proc/{holder['pid']}").exists() and holder["pid"] != os.getpid()


def _describe(out: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"pid", "host", "since"} <= holder.keys():
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return f"{out} is being written by {who}: wait for it, end it, or choose another output"
