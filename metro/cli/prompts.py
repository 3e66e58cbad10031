"""`metro templates` and `metro prompts`: fetch, list and show templates.

What encoder and decoder read, by objective:

========  ====================================  =======================
.         encoder                               decoder
========  ====================================  =======================
direct    prompt                                answer (every choice)
channel   answer (every choice)                 prompt
flipped   input and answer (every choice)       instruction
========  ====================================  =======================
"""

from pathlib import Path

import click

from metro.models.registry import METHODS
from metro.utils.messages import UserError

templates_option = click.option(
    "--templates",
    type=click.Path(path_type=Path),
    help="promptsource tree; default: METRO_TEMPLATES, else the fetched one.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")


@click.group(epilog="\b\nExample:\n  metro prompts show --dataset super_glue/rte")
def command() -> None:
    """List prompt templates; show what a model will read and be asked for."""


@command.command("list", epilog="\b\nExample:\n  metro prompts list --dataset super_glue/rte")
@click.option("--dataset", help="Only of this dataset, as super_glue/rte.")
@click.option("--mixture", help="Only of this mixture: t0, t0p, t0pp, flipped, ...")
@templates_option
@json_option
def list_prompts(
    dataset: str | None, mixture: str | None, templates: Path | None, as_json: bool
) -> None:
    """List templates with their metrics; --json prints everything."""
    from metro.data.datasets import name_of
    from metro.data.prompts.mixtures import find_mixture, split_dataset_name
    from metro.data.prompts.templates import find_templates

    tree = find_templates(templates)
    names = tree.datasets()
    if mixture:
        chosen = find_mixture(mixture).in_tree(tree)
        names = list(chosen.datasets)
    if dataset:
        wanted = split_dataset_name(dataset, tree)
        names = [name for name in names if name == wanted]
        if not names:
            raise UserError(f"mixture {mixture} has no dataset {dataset!r}")
    absent = []
    for name in names:
        try:
            found = tree.templates(*name) if not mixture else chosen.templates(tree, *name)
        except UserError:
            if dataset:
                raise
            absent.append(name_of(*name))
            continue
        for reason in tree.damaged(*name).values():
            click.echo(f"left out: {reason}", err=True)
        if not as_json:
            click.echo(f"{name_of(*name)}: {len(found)} templates")
        for template in found:
            _print_template(template, as_json)
    if absent:
        click.echo(f"no templates in {tree.path} for: {', '.join(absent)}", err=True)


def _print_template(template, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    if as_json:
        fields = {"task": template.task_name, **asdict(template)}
        click.echo(json.dumps(fields, ensure_ascii=False))
        return
    facts = [", ".join(template.metrics) or "no metric"]
    facts += ["answer choices"] if template.answer_choices else []
    facts += ["original task"] if template.original_task else []
    click.echo(f"  {template.name}  [{'; '.join(facts)}]")


@command.command(
    "show",
    epilog="\b\nExample:\n  metro prompts show --dataset super_glue/rte --objective flipped",
)
@click.option("--dataset", required=True, help="Dataset, as super_glue/rte or imdb.")
@click.option("--prompt", help="Name of one template; default: all of the dataset.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Local rows: DIR/DATASET/SUBSET/SPLIT.jsonl (csv, parquet, ...); default: the hub.",
)
@click.option("--split", help="Default: the validation split, else the first.")
@click.option("--limit", type=click.IntRange(min=1), default=1, help="Rows of the split.")
@click.option("--objective", default="direct", help="direct, channel or flipped.")
@click.option(
    "--instruction-text",
    default="published",
    help="published, or rendered: without branches that are not taken.",
)
@templates_option
@click.option("--seed", type=int, default=0, help="Of templates that draw at random.")
@json_option
def show_prompts(
    dataset: str,
    prompt: str | None,
    data_dir: Path | None,
    split: str | None,
    limit: int,
    objective: str,
    instruction_text: str,
    templates: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Show prompts, answers and answer choices of a dataset's rows.

    Rows that give no example are named on the error output.
    """
    from metro.data.datasets import available_splits, load_rows, name_of
    from metro.data.jsonl_rows import UnusableRow
    from metro.data.prompts.examples import ExampleSettings, make_example
    from metro.data.prompts.mixtures import split_dataset_name
    from metro.data.prompts.templates import find_templates

    if objective not in METHODS:
        raise UserError(f"--objective is {objective!r}, and must be one of {', '.join(METHODS)}")
    tree = find_templates(templates)
    name = split_dataset_name(dataset, tree)
    chosen = [tree.template(*name, prompt)] if prompt else tree.templates(*name)
    if split is None:
        splits = available_splits(*name, data_dir=data_dir)
        held_out = [split for split in splits if not split.startswith("train")]
        split = (held_out or splits)[0]
    rows = load_rows(*name, split, data_dir=data_dir, limit=limit)
    if not len(rows):
        raise UserError(f"split {split!r} of {name_of(*name)} has no rows")
    settings, shown = ExampleSettings(seed, instruction_text), 0
    for template in chosen:
        for number in range(len(rows)):
            try:
                example = make_example(template, rows[number], split, number, settings)
                view = _view(example, objective)
            except UnusableRow as error:
                click.echo(f"{template.name!r}, row {number}: {error}", err=True)
                continue
            shown += 1
            _print_view(view, as_json)
    if not shown:
        click.echo("no example to show", err=True)
        raise click.exceptions.Exit(1)


def _view(example, objective: str) -> dict:
    """Add ``encoder_texts`` and ``decoder_texts``, one pair per answer choice.

    The pair at ``label`` is the training pair; without answer choices it is the only one.

    Raises:
        UnusableRow: FLIPPED needs answer choices and an instruction, and there are none.
    """
    from metro.data.jsonl_rows import UnusableRow
    from metro.data.prompts.instruction import model_texts

    choices = example["answer_choices"]
    if objective == "flipped" and choices is None:
        raise UnusableRow("no answer choices, which FLIPPED needs")
    if objective == "flipped" and example["flipped_input"] is None:
        raise UnusableRow("no instruction, or an answer that is not among its choices")
    flipped = example["flipped_input"], example["instruction"]
    texts = [
        model_texts(objective, example["input"], answer, *flipped)
        for answer in ([example["target"]] if choices is None else choices)
    ]
    encoder, decoder = (list(side) for side in zip(*texts, strict=True))
    return {**example, "objective": objective, "encoder_texts": encoder, "decoder_texts": decoder}


def _print_view(view: dict, as_json: bool) -> None:
    import json

    if as_json:
        click.echo(json.dumps(view, ensure_ascii=False))
        return
    click.secho(f"{view['task']}, {view['split']} row {view['row']}", bold=True)
    # Text that all choices share is printed once.
    for part in ("encoder", "decoder"):
        texts = view[f"{part}_texts"]
        for i, text in enumerate(texts[:1] if len(set(texts)) == 1 else texts):
            choice = f" of choice {i}" if len(set(texts)) > 1 else ""
            answer = " (the answer)" if choice and view["label"] == i else ""
            click.echo(f"--- {part}{choice}{answer}\n{text}")
    click.echo("")


@click.group(epilog="\b\nExample:\n  metro templates fetch")
def templates() -> None:
    """Fetch the prompt templates of promptsource."""


@templates.command(epilog="\b\nExample:\n  metro templates fetch")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="The source package promptsource-0.2.3.tar.gz, downloaded before.",
)
@click.option("--index", help="Package index; default: PIP_INDEX_URL, else PyPI.")
@click.option("--again", is_flag=True, help="Replace existing templates.")
def fetch(file: Path | None, index: str | None, again: bool) -> None:
    """Download promptsource 0.2.3's source package and put its templates into the cache.

    The checksum is pinned, and no code of the package is run. Every command finds them there.
    """
    from metro.data.prompts.template_download import fetch_templates

    fetched = fetch_templates(file=file, index=index, again=again)
    note = " (present before; --again replaces them)" if fetched.was_there else ""
    click.echo(f"{fetched.folder}: templates of {fetched.num_files} datasets{note}")
