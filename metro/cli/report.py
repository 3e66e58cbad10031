"""`metro report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of `metro evaluate`, or folders that hold some."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("report"),
    published: Annotated[
        list[str] | None,
        typer.Option(help="Published rows to show: all, none, or names of `metro models`."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Only the runs of this suite.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the report.")] = None,
) -> None:
    """Make tables and plots of evaluations, beside the published numbers.

    Writes report.html (everything on one page), report.md, report.tex, tasks.csv, prompts.csv, and
    the figure of each suite as SVG.
    """
    from metro.evaluation.report.build import report as write

    done = write(runs, out, published or ["all"], suite, title)
    print(done)
    print("wrote " + ", ".join(str(path) for path in done.paths))
