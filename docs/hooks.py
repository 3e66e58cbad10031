"""Hooks of mkdocs: the notebook as a page, tables of settings classes, plain docstrings."""

import importlib
import json
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from mkdocs.structure.files import File

SETTINGS = re.compile(r"<!-- settings: ([\w.]+)\.(\w+) -->")


def on_files(files, config):
    """Add the notebook as a page."""
    text = as_markdown(Path(config.docs_dir) / "quickstart.ipynb")
    files.append(File.generated(config, "quickstart.md", content=text))
    return files


def as_markdown(notebook: Path) -> str:
    """Text, code, and what it printed or showed."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            shown = output.get("data", {"text/plain": output.get("text")})
            html, text = "".join(shown.get("text/html", "")), "".join(shown["text/plain"])
            parts.append(html or f"```text\n{text}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_) -> str:
    """Replace ``<!-- settings: module.Class -->`` by a table of the fields."""
    return SETTINGS.sub(lambda found: table(found[1], found[2]), markdown)


def on_page_content(html: str, **_) -> str:
    """Remove the roles (``:func:`load```) and the second colon of ``::`` from an API page."""
    html = re.sub(r":(?:func|class|mod|meth|attr):(?=<code>)", "", html)
    return html.replace("::</p>", ":</p>")


def table(module: str, name: str) -> str:
    """The fields of a settings class; these modules import the standard library alone."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    try:
        settings = getattr(importlib.import_module(module), name)
    finally:
        del sys.path[0]
    rows = [f"### {name}", "", "| setting | default | |", "|---|---|---|"]
    for part in fields(settings):
        about, default = part.metadata, part.default
        if part.default_factory is not MISSING:
            default = part.default_factory()
        shown = "required" if default is MISSING else f"`{default}`"
        text = " ".join([about["help"], *(["One of"] if about["choices"] else [])])
        choices = ", ".join(f"`{choice}`" for choice in about["choices"])
        cells = (f"`{part.name}`", shown, f"{text} {choices}".strip())
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
