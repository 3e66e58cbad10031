"""Reads the pages: their code blocks with line numbers, commands, links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    where: str
    """Page and line, for messages."""
    not_run: str | None
    """The reason of a comment ``<!-- not run: reason -->`` before it."""


def blocks(page: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a page in order, those in list items without their indentation."""
    found: list[Block] = []
    opened: tuple[str, str, int] | None = None
    reason, body = None, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"( *)```(\w*)", line)
        if opened is None and fence:
            opened, body = (fence[1], fence[2], number), []
        elif opened is not None and fence:
            indent, kind, start = opened
            text = "".join(part.removeprefix(indent) + "\n" for part in body)
            found.append(Block(kind, text, f"{page.name}:{start}", reason))
            opened = reason = None
        elif opened is not None:
            body.append(line)
        elif line.strip():
            comment = NOT_RUN.fullmatch(line.strip())
            reason = comment[1] if comment else None
    assert opened is None, f"{page.name}:{opened} is not closed"
    return [block for block in found if language in ("", block.language)]


def commands(script: str) -> list[list[str]]:
    """The words of every command of a shell block; ``$(which X)`` is one word."""
    lines = script.replace("\\\n", " ").replace("$(which ", "$(which-").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    parts = []
    for words in split:
        while "|" in words:
            parts.append(words[: words.index("|")])
            words = words[words.index("|") + 1 :]
        parts.append(words)
    return [words for words in parts if words]


def metro_arguments(words: list[str]) -> list[str] | None:
    """What follows ``metro`` in a command, also below torchrun; None if it is another program."""
    for name in ("metro", "$(which-metro)"):
        if name in words and words[0] in ("torchrun", "metro"):
            return words[words.index(name) + 1 :]
    return None


def anchors(page: Path) -> set[str]:
    """The anchors of headings, and in the site those of the API reference."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    settings = re.findall(r"^<!-- settings: [\w.]+\.(\w+) -->$", text, re.MULTILINE)
    return {*found, *re.findall(r"^::: (\S+)$", text, re.MULTILINE), *map(str.lower, settings)}


def links(page: Path) -> list[str]:
    """Targets of links and pictures, reference-style ones included."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)
