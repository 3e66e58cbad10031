"""Messages for users: the one error class, and the phrases that several messages share."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

DISTRIBUTION = "metro-t5"
"""Name of this project on package indexes; the import name is ``metro``."""


class UserError(ValueError):
    """A mistake the user can correct: the message names the value and the remedy.

    The command line prints it as one line. Every other exception is a fault of METRO's own and
    keeps its traceback.
    """


class MissingPackage(UserError, ImportError):
    """An optional package that is needed here is not installed."""

    def __init__(self, purpose: str, package: str, extra: str):
        super().__init__(f"{purpose} needs the package {package}: {install_command(extra)}")


REMEDIES = {
    errno.ENOENT: "does not exist: correct the path",
    errno.EACCES: "may not be read or written by you: change its permissions or use another path",
    errno.EPERM: "may not be changed by you: use another path",
    errno.EISDIR: "is a folder: name a file",
    errno.ENOTDIR: "is not a folder: name a folder",
    errno.EEXIST: "exists already: use another path",
    errno.ENOSPC: "cannot be written, the disk is full: make room or use another disk",
    errno.EDQUOT: "cannot be written, your quota is used up: make room or use another disk",
    errno.EFBIG: "cannot be written, it is larger than the file system or `ulimit -f` allows",
    errno.EROFS: "is on a read-only file system: use another path",
    errno.ENAMETOOLONG: "has too long a name: use a shorter one",
    errno.ENOTEMPTY: "is not empty: use another path",
    errno.EXDEV: "is on another file system: keep inputs and outputs on one",
}
"""Remedy for a path by the error number of the operating system."""


def one_line(error: Exception) -> str | None:
    """Word an error that the user can correct; None for a fault of METRO's."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        path = error.filename2 or error.filename
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return f"{path if isinstance(path, str) else 'an output file'} {REMEDIES[error.errno]}"
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or torch and isinstance(error, torch.OutOfMemoryError):
        return "out of memory: use smaller batches, or fewer processes"
    return None


def install_command(extra: str) -> str:
    """Command that installs an extra of METRO, from a checkout or from a package index."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Names similar to ``name``, or the first known ones where none is similar."""
    known = list(known)
    lowered = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=cutoff)
    if close:
        return f"did you mean {' or '.join(repr(lowered[other]) for other in close)}?"
    return f"known: {shortened(known)}"


def shortened(names: Iterable[str], most: int = 8) -> str:
    """Comma-separated names, the first ``most`` of them where there are many more."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names) if rest < 2 else f"{', '.join(names[:most])} and {rest} more"


def counted(number: int, noun: str, show: Callable[[int], str] = str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{show(number)} {noun}{'' if number == 1 else 's'}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction as a percentage without the sign, empty for None."""
    return "" if fraction is None else f"{100 * fraction:.{digits}f}"
