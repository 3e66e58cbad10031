"""`metro evaluate`: zero-shot evaluation of models on a suite of tasks."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Registered names, hub ids, Hugging Face folders, fairseq checkpoints (.pt).",
        ),
    ],
    suite: Annotated[
        str,
        typer.Option(help="t0, flipped14, bigbench, label_generalization, mmlu, or a file .yaml."),
    ] = "t0",
    out: Annotated[Path, typer.Option(help="A folder per run is made in it.")] = Path("results"),
    method: Annotated[
        str | None,
        typer.Option(help="direct, channel or flipped; default: what the model was made for."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Special tokens and lengths of metro, t0, flipped or t5; default: the model's."
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Only this prompt; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="So many rows of each task, evenly spread.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Instead of the suite's split.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Local data: <dataset>/<subset or default>/<split>.jsonl."),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="A promptsource tree; default: the one that was fetched.")
    ] = None,
    bigbench_dir: Annotated[
        Path | None,
        typer.Option(help="<task>/task.json of BIG-bench; default: bigbench in --data-dir."),
    ] = None,
    normalization: Annotated[
        str, typer.Option(help="sum (published), mean (per token), or calibrated.")
    ] = "sum",
    instruction_text: Annotated[
        str, typer.Option(help="published or rendered; for method flipped.")
    ] = "published",
    label_words: Annotated[
        str,
        typer.Option(help="words, published or original; for label_generalization."),
    ] = "words",
    max_source_length: Annotated[
        int | None, typer.Option(help="Tokens; default: the model family's.")
    ] = None,
    max_target_length: Annotated[
        int | None, typer.Option(help="Tokens; default: the model family's.")
    ] = None,
    vocab: Annotated[
        Path | None, typer.Option(help="Vocabulary folder of a fairseq checkpoint.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    attention: Annotated[str | None, typer.Option(help="sdpa or eager.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a batch; changes speed and memory only.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of templates that draw at random.")] = 0,
    run_name: Annotated[
        str | None, typer.Option(help="The run's folder in --out; default: MODEL-METHOD-SUITE.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option(help="Succeed although data of some tasks are missing.")
    ] = False,
    check_published: Annotated[
        bool, typer.Option(help="Fail if a registered model misses its published accuracy.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="Percentage points per task for --check-published.")
    ] = 1.0,
    overwrite: Annotated[
        bool, typer.Option(help="Delete a run of the same name instead of going on.")
    ] = False,
) -> None:
    """Evaluate models zero-shot by ranking the answer options of every prompt.

    A run that was stopped goes on when the same command is given. `torchrun --nproc_per_node N
    $(which metro) evaluate ...` shares the work.
    """
    from metro.evaluation.command import EvaluationCommand

    given = locals()
    given.pop("EvaluationCommand")
    given["tasks"], given["prompts"] = given.pop("task") or [], given.pop("prompt") or []
    raise typer.Exit(EvaluationCommand(**given).run())
