"""The table of what METRO-T5 works with: the tests marked ``client(NAME, WHAT)``.

``python -m tests.docs.clients`` writes it between its two marks in README.md.
"""

import ast

from .pages import ROOT

PAGE = ROOT / "README.md"
BEGIN, END = "<!-- clients: written by `python -m tests.docs.clients` -->\n", "<!-- end -->\n"


def table() -> str:
    """One line per mark: the client, what the test shows, where it is."""
    rows = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.client":
                client, what = map(ast.literal_eval, node.args)
                rows.append(f"| {client} | {what} | `{path.relative_to(ROOT)}` |\n")
    return "".join(
        ["| client | what works | test |\n|---|---|---|\n", *sorted(rows, key=str.lower)]
    )


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")
