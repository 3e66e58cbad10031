"""`metro models`: the released checkpoints and their results; `metro plan`: memory of a model."""

import json
from pathlib import Path

import click

from metro.cli.options import settings_command
from metro.planning.settings import PlanSettings
from metro.utils.messages import UserError


@click.command(epilog="\b\nExample:\n  metro models metro_t0_base")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--write-cards",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a model card of each into a folder.",
)
def command(name: str | None, as_json: bool, write_cards: Path | None) -> None:
    """List the released checkpoints, or show one with its published results.

    Their names are understood by every command that takes a model.
    """
    from metro.models import registry, registry_cards

    if write_cards:
        if name or as_json:
            raise UserError("--write-cards writes all cards: leave the name and --json out")
        written = registry_cards.write_cards(write_cards)
        click.echo(f"{len(written)} model cards written into {write_cards}")
    elif name is None:
        all_models = registry.registered_models()
        if as_json:
            click.echo(json.dumps([model.as_dict() for model in all_models.values()], indent=2))
        else:
            show_list(all_models.values())
    else:
        model = registry.registered_model(name)
        if as_json:
            click.echo(json.dumps(model.as_dict(), indent=2))
        else:
            show_one(model)


def show_list(all_models) -> None:
    from rich.console import Console
    from rich.table import Table

    from metro.models.registry import show_parameters
    from metro.models.registry_cards import ResultTable, show_percent

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "weights", "data", "T0 Eval", "hub id"):
        numeric = heading in ("weights", "T0 Eval")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for model in all_models:
        means = [mean for mean in ResultTable(model, "t0").means if mean != "-"]
        table.add_row(
            model.name,
            show_parameters(model.parameters),
            model.finetuning.split(" Train")[0],
            means[0] if means else show_percent(None),
            model.hub_id,
        )
    console = Console()
    console.print(table)
    console.print(
        "\ndata: what it was finetuned on. T0 Eval: published accuracy in percent, mean of 11 sets."
        "\n`metro models NAME` shows a model, `metro generate NAME TEXT` asks it.",
        markup=False,
        soft_wrap=True,
    )


def show_one(model) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from metro.models.registry_cards import facts_of, result_tables

    console = Console()
    console.print(f"[bold]{model.name}[/]  {escape(model.title)}\n")
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for heading, text in facts_of(model):
        facts.add_row(heading, escape(text))
    console.print(facts)
    console.print("\nPublished accuracy in percent, mean over prompts", markup=False)
    for results in result_tables(model):
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.add_column(results.title, no_wrap=True)
        for source in results.sources:
            table.add_column(escape(source), justify="right", max_width=32)
        for row in results.rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(results.mean_title, *results.means, style="bold")
        console.print()
        console.print(table)


def plan(settings: PlanSettings) -> None:
    """Show what fits on your GPUs, with which options: to use, finetune or pretrain a model.

    Memory of one GPU in GB (10^9 bytes) by a formula, the most comfortable way first; below a table
    the command of the first that fits. No weights are read.
    """
    from metro.planning.plan import plan as run

    click.echo(run(settings))


plan_command = settings_command(
    plan,
    PlanSettings,
    example="metro plan --model flipped_11b --gpus 8 --memory 80",
)
