"""`metro evaluate`: zero-shot evaluation on a suite of tasks; `metro report`: its tables."""

import click

from metro.cli.options import settings_command
from metro.evaluation.settings import EvaluationSettings, ReportSettings
from metro.utils.messages import UserError
from metro.utils.progress import Progress, is_first_process

MISSING_DATA = 3
"""Exit status if some tasks or prompts could not be evaluated, as for want of data."""


def evaluate(settings: EvaluationSettings, allow_missing: bool) -> None:
    """Evaluate models zero-shot by ranking the answer choices of every prompt.

    Run the command again to resume an interrupted run or to extend a partial one (--task, --limit).
    `torchrun --nproc_per_node N $(which metro) evaluate ...` shares the work.
    """
    from metro.evaluation.evaluate import evaluate_models

    failures: list[str] = []
    missing: dict[str, str] = {}
    with Progress() as progress:
        for evaluation in evaluate_models(settings, progress):
            if isinstance(evaluation, UserError):
                failures.append(str(evaluation))
                if len(settings.models) > 1:
                    progress.say(f"failed: {evaluation}")
                continue
            missing |= evaluation.missing
            if not is_first_process():
                continue
            click.echo(evaluation)
            if evaluation.published:
                progress.say(evaluation.published.table)
                failures += filter(None, [evaluation.published.failure])
        if missing:
            kind = "task or prompt" if len(missing) == 1 else "tasks or prompts"
            progress.say(f"left out, {len(missing)} {kind}:")
            for reason, names in by_reason(missing).items():
                progress.say(f"  {', '.join(names)}: {reason}")
            if not allow_missing:
                progress.say("use --allow-missing to exit 0 anyway")
    if failures:
        raise UserError("; ".join(failures))
    if missing and not allow_missing:
        raise click.exceptions.Exit(MISSING_DATA)


def by_reason(missing: dict[str, str]) -> dict[str, list[str]]:
    """Reason -> the tasks and prompts that were left out for it."""
    found: dict[str, list[str]] = {}
    for name, reason in missing.items():
        found.setdefault(reason, []).append(name)
    return found


command = settings_command(
    evaluate,
    EvaluationSettings,
    example="metro evaluate metro_t0_base --suite t0 --limit 100",
    resumes=True,
    extra=[
        click.Option(
            ["--allow-missing/--no-allow-missing"],
            help="Succeed although tasks or prompts could not be evaluated.",
        )
    ],
)


def report(settings: ReportSettings) -> None:
    """Make tables and plots of evaluations, beside the published numbers.

    Writes report.html (everything on one page), report.md, report.tex, tasks.csv, prompts.csv, and
    the figure of each suite as SVG.
    """
    from metro.evaluation.report.build import report as write

    done = write(settings)
    click.echo(done)
    click.echo("wrote " + ", ".join(str(path) for path in done.paths))


report_command = settings_command(
    report, ReportSettings, example="metro report results --out report --published metro_t0_base"
)
