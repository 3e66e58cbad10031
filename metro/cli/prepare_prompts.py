"""`metro prepare-prompts`: datasets and prompt templates to finetuning data."""

from pathlib import Path
from typing import Annotated

import typer

from metro.cli.progress import Work
from metro.utils.messages import UserError


def prepare_prompts(
    mixture: Annotated[
        str,
        typer.Option(
            "--mixture", "-m", help="t0, t0p, t0pp, t0_train_eval, flipped, or a FILE.yaml."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to make.")] = None,
    vocab: Annotated[
        Path | None, typer.Option(help="Folder with sp.model and dict.txt: makes ids, for fairseq.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="fairseq or jsonl; default: fairseq if there is a --vocab."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Local rows, DIR/DATASET/SUBSET/SPLIT.jsonl, in place of the hub."),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="promptsource tree; default: METRO_TEMPLATES, else the fetched one."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Only this dataset of the mixture, as super_glue/rte; repeatable."),
    ] = None,
    source: Annotated[
        str, typer.Option(help="templates, or p3: prompts that bigscience/P3 has rendered.")
    ] = "templates",
    validation: Annotated[
        str,
        typer.Option(help="Tasks to validate on: published, all of the mixture, or none."),
    ] = "published",
    limit: Annotated[
        int | None, typer.Option(help="At most N rows of a dataset and side, spread evenly.")
    ] = None,
    valid_limit: Annotated[
        int | None, typer.Option(help="The same for validation; default: --limit.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of templates that draw at random.")] = 0,
    instruction_text: Annotated[
        str,
        typer.Option(help="FLIPPED: published, or rendered (without branches not taken)."),
    ] = "published",
    cased: Annotated[
        bool, typer.Option("--cased/--uncased", help="Keep capitals, or fold them (fairseq).")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its sizes; write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a result made with other settings.")
    ] = False,
) -> None:
    """Turn datasets and prompt templates into finetuning data.

    Datasets that cannot be had are listed at the end; the exit code is 0 as long as there is
    something to train on.

    Run the same command again to continue after an interruption.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    from metro.data.prompts.prepare import prepare_prompts as prepare
    from metro.data.prompts.settings import plan_prompts, read_settings

    options = dict(
        vocab=vocab,
        format=format,
        templates=templates,
        data_dir=data_dir,
        data_sets=dataset,
        source=source,
        validation=validation,
        limit=limit,
        valid_limit=valid_limit,
        seed=seed,
        instruction_text=instruction_text,
        lower=not cased,
    )
    if dry_run:
        settings = read_settings(mixture, **options)
        _print_plan(plan_prompts(settings), settings)
        return
    if out is None:
        raise UserError("--out is missing: name the folder to make (or add --dry-run)")
    work = Work(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("parts"),
        TextColumn("{task.fields[rendered]:,} prompts"),
        TimeElapsedColumn(),
    )
    with work:
        result = prepare(
            mixture,
            out,
            num_workers=workers,
            overwrite=overwrite,
            say=work.say,
            progress=lambda now: work.show(
                "prompts",
                description=now.step,
                completed=now.parts_done,
                total=now.num_parts,
                rendered=now.done,
            ),
            **options,
        )
    _print_result(work, result)


def _print_plan(lines, settings) -> None:
    from rich.console import Console
    from rich.table import Table

    from metro.data.prompts.sources import Unavailable

    unit = "tokens" if settings.vocabulary else "words"
    table = Table(title=f"mixture {settings.mixture.name}, as {settings.format}")
    for column in ("side", "dataset"):
        table.add_column(column)
    per = "dataset" if settings.mixture.cap_of == "data_set" else "template"
    for column in ("templates", "rows", "examples", f"cap/{per}", "an epoch reads", f"~{unit}"):
        table.add_column(column, justify="right")
    rows = [line for line in lines if not isinstance(line, Unavailable)]
    totals: dict[str, list[int]] = {}
    for row in rows:
        table.add_row(row.side, row.data_set, *(f"{value:,}" for value in row[2:]))
        total = totals.setdefault(row.side, [0, 0, 0, 0, 0])
        for i, value in enumerate((row.templates, row.rows, row.examples, row.per_epoch,
                                   row.tokens)):  # fmt: skip
            total[i] += value
    for side, total in totals.items():
        shown = [f"{value:,}" for value in total]
        table.add_row(side, "all", *shown[:3], "", *shown[3:], style="bold")
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    _print_unavailable(console, [line for line in lines if isinstance(line, Unavailable)])
    if not rows:
        raise UserError(f"mixture {settings.mixture.name}: none of its datasets can be had")


def _print_unavailable(console, rows) -> None:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title="not to be had")
    for column in ("side", "dataset", "why"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.side, row.name, Text(row.reason))
    console.print(table)


def _print_result(work: Work, result) -> None:
    from metro.data.prompts.sources import Unavailable

    manifest = result.manifest
    _print_unavailable(work.console, [Unavailable(**row) for row in manifest["unavailable"]])
    for reason in sorted(set(manifest["left_out"].values())):
        count = sum(found == reason for found in manifest["left_out"].values())
        work.say(f"templates left out by the mixture's rules: {count} ({reason})")
    for kind in ("dropped", "noted"):
        for reason, facts in manifest[kind].items():
            work.say(f"{kind} {facts['count']:,}: {reason} (first: {facts['first']})")
    if empty := manifest["empty_tasks"]:
        work.say(f"tasks without a single example, left out: {', '.join(empty)}")
    parts = []
    for side, tasks in manifest["splits"].items():
        examples = sum(facts["num_examples"] for facts in tasks.values())
        parts.append(f"{side} {len(tasks):,} tasks, {examples:,} examples")
    print(f"{result.folder}: {'; '.join(parts)}; format {manifest['format']}")
