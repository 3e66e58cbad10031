"""Messages for users: the one error class, and the phrases that several messages share."""

import difflib
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
