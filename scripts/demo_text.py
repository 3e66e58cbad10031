"""English text from the docstrings of installed Python packages, for the demonstration.

The standard library and the packages METRO needs have 5 MB of them. Files are searched for
strings in triple quotes, nothing is imported or run, and only paragraphs that look like prose are
kept: one document per module, one line per paragraph. Enough to try pretraining without a network.
"""

import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from metro.utils.files import write_text
from metro.utils.messages import UserError

# In this order, so that a short text is mostly about Python and mathematics.
PACKAGES = ["numpy", "sympy", "networkx", "matplotlib", "torch", "transformers"]
SKIPPED_FOLDERS = {"tests", "test", "testing", "idlelib", "lib2to3", "site-packages", "_vendor"}
MIN_WORDS = 12

_STRING = re.compile(r"(['\"])\1\1(.*?)\1{3}", re.DOTALL)
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+")
_QUOTED = re.compile(r"`+([^`]*)`+_*")
_LIST_MARK = re.compile(r"^(?:[-*+•]|\d+[.)]|\[\d+\])\s+")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[,.;:!?)]*")
_NO_PROSE = (">>>", "::", "---", "===", "+--", "|", "\\", "http", "{", "}", "<", "@", ".. ")


def default_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed PACKAGES."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"])]
    roots += [Path(paths["purelib"]) / name for name in PACKAGES]
    return [root for root in roots if root.is_dir()]


def documents(roots: Iterable[Path]) -> Iterator[list[str]]:
    """Yield the paragraphs of one module at a time, in a fixed order and without repetitions."""
    seen: set[str] = set()
    for module in modules(roots):
        fresh = [text for text in dict.fromkeys(module_paragraphs(module)) if text not in seen]
        seen.update(fresh)
        if fresh:
            yield fresh


def modules(roots: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files to read, in a fixed order."""
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]):
                yield path


def module_paragraphs(path: Path) -> list[str]:
    """Return the prose in the strings in triple quotes of a Python file, in its order."""
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []  # test files for other encodings
    return [text for match in _STRING.finditer(source) for text in prose_paragraphs(match[2])]


def prose_paragraphs(docstring: str) -> list[str]:
    """Return the paragraphs of a docstring that are English sentences, each as one line."""
    kept = []
    for block in re.split(r"\n\s*\n", docstring.expandtabs()):
        lines = block.strip("\n").splitlines()
        # "name : type" above an indented explanation, as in numpydoc's parameter lists
        while len(lines) > 1 and _indent(lines[1]) > _indent(lines[0]):
            lines.pop(0)
        text = " ".join(line.strip() for line in lines)
        text = _LIST_MARK.sub("", text)
        text = _QUOTED.sub(r"\1", _LINK.sub(r"\1", _ROLE.sub(r"\1", text)))
        text = re.sub(r"\s+", " ", text.replace("**", "")).strip()
        if is_prose(text):
            kept.append(text)
    return kept


def is_prose(text: str) -> bool:
    """Recognise sentences: a capital first, a full stop last, nearly all of it words."""
    if not text[:1].isupper() or text[-1:] not in ".!?" or any(mark in text for mark in _NO_PROSE):
        return False
    words = text.split()
    if len(words) < MIN_WORDS:
        return False
    return sum(bool(_WORD.fullmatch(word)) for word in words) >= 0.85 * len(words)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def write_demo_text(path: Path, num_bytes: int, roots: Iterable[Path] | None = None) -> int:
    """Write about `num_bytes` of text, documents separated by an empty line; return the bytes."""
    texts, written = [], 0
    for paragraphs in documents(default_roots() if roots is None else roots):
        texts.append("\n".join(paragraphs) + "\n\n")
        written += len(texts[-1].encode("utf-8"))
        if written >= num_bytes:
            break
    if written == 0:
        raise UserError(
            "no Python sources with documentation found to make a demonstration text from; "
            'give a text of your own: make demo DEMO_TEXT="my.txt"'
        )
    write_text(path, "".join(texts))
    return written
