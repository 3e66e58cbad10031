"""`metro prepare-prompts`: datasets and prompt templates to finetuning data."""

import click

from metro.cli.options import settings_command
from metro.data.settings import PreparePromptsSettings
from metro.utils.messages import UserError, shortened


def prepare_prompts(settings: PreparePromptsSettings, dry_run: bool) -> None:
    """Turn datasets and prompt templates into finetuning data.

    Datasets that are not available are listed at the end; the exit code is 0 as long as there is
    something to train on. Run the same command again to resume after an interruption.
    """
    from metro.data.prompts.plan import make_plan, planned_sizes
    from metro.data.prompts.prepare import prepare_prompts as prepare

    if dry_run:
        found = make_plan(settings)
        print_plan(planned_sizes(found), found)
        return
    result = prepare(settings)
    print_result(result)


def print_plan(lines, settings) -> None:
    """Print what would be made, a dataset per line, and the sums."""
    from rich.console import Console
    from rich.table import Table

    from metro.data.prompts.sources import Unavailable

    unit = "tokens" if settings.vocabulary else "words"
    table = Table(title=f"mixture {settings.mixture.name}, as {settings.format}")
    for column in ("side", "dataset"):
        table.add_column(column)
    per = "dataset" if settings.mixture.cap_of == "dataset" else "template"
    for column in ("templates", "rows", "examples", f"cap/{per}", "an epoch reads", f"~{unit}"):
        table.add_column(column, justify="right")
    lines = list(lines)
    rows = [line for line in lines if not isinstance(line, Unavailable)]
    for row in rows:
        table.add_row(row.side, row.dataset, *(f"{value:,}" for value in row[2:]))
    for side in dict.fromkeys(row.side for row in rows):
        sums = [
            sum(column) for column in zip(*(r[2:] for r in rows if r.side == side), strict=True)
        ]
        shown = [f"{value:,}" for value in sums]
        shown[3] = ""  # caps do not add up
        table.add_row(side, "all", *shown, style="bold")
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    print_unavailable(console, [line._asdict() for line in lines if isinstance(line, Unavailable)])
    if not rows:
        raise UserError(f"mixture {settings.mixture.name}: none of its datasets is available")


def print_unavailable(console, rows: list[dict]) -> None:
    """Print a table of datasets that are not available, and why."""
    from rich.table import Table
    from rich.text import Text

    from metro.data.prompts.sources import Unavailable

    if not rows:
        return
    table = Table(title="not available")
    for column in ("side", "dataset", "why"):
        table.add_column(column)
    same: dict[str, list[dict]] = {}  # without a network all have one reason
    for row in rows:
        same.setdefault(Unavailable(**row).reason_of_any, []).append(row)
    for reason, group in same.items():
        if len(group) > 2:
            names = shortened(dict.fromkeys(row["name"] for row in group), 3)
            table.add_row("", names, Text(reason))
        else:
            for row in group:
                table.add_row(row["side"], row["name"], Text(row["reason"]))
    console.print(table)


def print_result(result) -> None:
    """Print what was made, and on stderr what was left out."""
    from rich.console import Console

    manifest = result.manifest
    print_unavailable(Console(stderr=True, highlight=False), manifest["unavailable"])
    lines = []
    for reason in sorted(set(manifest["left_out"].values())):
        count = sum(found == reason for found in manifest["left_out"].values())
        lines.append(f"templates left out by the mixture's rules: {count} ({reason})")
    kept = [
        facts["num_examples"] for side in manifest["splits"].values() for facts in side.values()
    ]
    total = sum(kept) + sum(facts["count"] for facts in manifest["dropped"].values())
    for kind in ("dropped", "noted"):
        for reason, facts in manifest[kind].items():
            share = f"{facts['count']:,} of {total:,} prompts ({facts['count'] / total:.1%})"
            lines.append(f"{kind} {share}: {reason} (first: {facts['first']})")
    if empty := manifest["empty_tasks"]:
        lines.append(f"tasks without a single example, left out: {', '.join(empty)}")
    for line in lines:
        click.echo(line, err=True)
    parts = []
    for side, tasks in manifest["splits"].items():
        examples = sum(facts["num_examples"] for facts in tasks.values())
        parts.append(f"{side} {len(tasks):,} tasks, {examples:,} examples")
    click.echo(f"{result.folder}: {'; '.join(parts)}; format {manifest['format']}")


command = settings_command(
    prepare_prompts,
    PreparePromptsSettings,
    example="metro prepare-prompts --mixture t0 --out prompts",
    resumes=True,
    extra=[
        click.Option(
            ["--dry-run"], is_flag=True, help="Print the plan and its sizes; write nothing."
        )
    ],
)
