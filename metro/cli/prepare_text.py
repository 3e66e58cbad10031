"""`metro prepare-text`: text to binarised pretraining data."""

from pathlib import Path
from typing import Annotated

import typer

from metro.cli.progress import Work
from metro.data import DEFAULT_VALID_FRACTION


def prepare_text(
    input: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            help="Text (empty line = new document), .jsonl with a `text` field, .gz of both, or "
            "hf:DATASET[:CONFIG]. Repeat for several.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make, for fairseq-train.")],
    more_inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="More inputs.")
    ] = None,
    vocab: Annotated[Path | None, typer.Option(help="Folder with sp.model and dict.txt.")] = None,
    train_vocab: Annotated[
        int | None, typer.Option(metavar="N", help="Train a vocabulary of N ids on the input.")
    ] = None,
    cased: Annotated[
        bool, typer.Option("--cased/--uncased", help="Keep capitals, or fold them.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of the documents for the validation set; 0: none.")
    ] = DEFAULT_VALID_FRACTION,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a result made with other settings.")
    ] = False,
) -> None:
    """Turn text into the binarised data that pretraining reads.

    Writes train, valid, dict.txt and sp.model into one folder.

    Run the same command again to continue after an interruption.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from metro.data.text.corpus import prepare_text as prepare

    work = Work(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with work:
        result = prepare(
            [*input, *(more_inputs or [])],
            out,
            vocab=vocab,
            train_vocab=train_vocab,
            lower=not cased,
            num_workers=workers,
            valid_fraction=valid_fraction,
            overwrite=overwrite,
            say=work.say,
            progress=lambda now: work.show(now.step, completed=now.done, total=now.total),
        )
    if not result.was_finished:
        counts = result.manifest["counts"]
        unknown = counts["unknown_tokens"] / (counts["train_tokens"] + counts["valid_tokens"])
        print(
            f"{result.folder}: {counts['documents']:,} documents; "
            f"train {counts['train_items']:,} lines, {counts['train_tokens']:,} tokens; "
            f"valid {counts['valid_items']:,} lines, {counts['valid_tokens']:,} tokens; "
            f"vocabulary {counts['vocab_size']:,}; {unknown:.3%} of the tokens unknown"
        )
