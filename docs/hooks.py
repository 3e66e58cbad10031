"""Hooks of mkdocs: traces of reStructuredText in docstrings become Markdown's output."""

import re


def on_page_content(html: str, **_) -> str:
    """Remove the roles (``:func:`load```) and the second colon of ``::`` from an API page."""
    html = re.sub(r":(?:func|class|mod|meth|attr):(?=<code>)", "", html)
    return html.replace("::</p>", ":</p>")
