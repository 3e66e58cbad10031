"""`metro prepare-text`: text to binarised pretraining data."""

import time
from pathlib import Path
from typing import Annotated

import typer

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
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from metro.data.corpus import prepare_text as prepare

    console = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # no thread: worker processes are forked while the bar stands
    )
    tasks, last_shown = {}, 0.0

    def show(now) -> None:
        nonlocal last_shown
        if now.step not in tasks:
            tasks[now.step] = bar.add_task(now.step, total=now.total, completed=now.done)
        is_due = time.monotonic() - last_shown > 0.1
        last_shown = time.monotonic() if is_due else last_shown
        bar.update(tasks[now.step], completed=now.done, refresh=is_due)

    try:
        with bar:
            result = prepare(
                [*input, *(more_inputs or [])],
                out,
                vocab=vocab,
                train_vocab=train_vocab,
                lower=not cased,
                num_workers=workers,
                valid_fraction=valid_fraction,
                overwrite=overwrite,
                say=lambda line: console.print(line, markup=False, soft_wrap=True),
                progress=show,
            )
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again to continue")
        raise typer.Exit(130) from None
    except RuntimeError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if not result.was_finished:
        counts = result.manifest["counts"]
        unknown = counts["unknown_tokens"] / (counts["train_tokens"] + counts["valid_tokens"])
        print(
            f"{result.folder}: {counts['documents']:,} documents; "
            f"train {counts['train_items']:,} lines, {counts['train_tokens']:,} tokens; "
            f"valid {counts['valid_items']:,} lines, {counts['valid_tokens']:,} tokens; "
            f"vocabulary {counts['vocab_size']:,}; {unknown:.3%} of the tokens unknown"
        )
