"""`metro report`: tables and plots of evaluations."""

import click

from metro.cli.options import settings_command
from metro.evaluation.settings import ReportSettings


def report(settings: ReportSettings) -> None:
    """Make tables and plots of evaluations, beside the published numbers.

    Writes report.html (everything on one page), report.md, report.tex, tasks.csv, prompts.csv, and
    the figure of each suite as SVG.
    """
    from metro.evaluation.report.build import report as write

    done = write(settings)
    click.echo(done)
    click.echo("wrote " + ", ".join(str(path) for path in done.paths))


command = settings_command(
    report, ReportSettings, example="metro report results --out report --published metro_t0_base"
)
