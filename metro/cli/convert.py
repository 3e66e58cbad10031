"""`metro convert`: fairseq checkpoints to Hugging Face folders, and back."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Convert models.")

Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: every tensor keeps its own."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.callback()
def root() -> None:
    """Convert fairseq checkpoints to Hugging Face folders, and back, exactly."""


@app.command("to-hf")
def convert_to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint (.pt) of fairseq.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    vocab: Annotated[
        Path | None,
        typer.Option(
            help="Folder with sp.model and dict.txt; default: what it was trained on.",
        ),
    ] = None,
    dtype: Dtype = None,
    keep_auxiliary: Annotated[
        bool,
        typer.Option("--keep-auxiliary", help="Keep the auxiliary model and the RTD head too."),
    ] = False,
    cased: Annotated[
        bool | None,
        typer.Option(
            "--cased/--uncased", help="Keep capitals; default: as the vocabulary was made."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder that loads anywhere.

    Takes checkpoints of this project and of the original METRO-T0 code.
    """
    from metro.modeling.text_metro_t5 import Vocabulary
    from metro.models.source import check_file
    from metro.utils.files import check_output

    check_output(out, overwrite, (checkpoint,))  # here too, before seconds of imports
    check_file(checkpoint)
    if vocab:
        Vocabulary.from_folder(vocab)
    from metro.conversion.fairseq_to_hf import to_hf
    from metro.models.loading import resolve_dtype

    done = to_hf(
        checkpoint,
        out,
        vocab=vocab,
        dtype=resolve_dtype(dtype),
        keep_auxiliary=keep_auxiliary,
        lower=None if cased is None else not cased,
        overwrite=overwrite,
    )
    case = "folds capitals" if done.lower else "keeps capitals"
    print(f"{done.out}: {done.num_parameters:,} parameters in {done.dtype}")
    print(f"vocabulary: {done.vocabulary} ({case})")
    for part in done.dropped:
        remedy = "" if "optimizer" in part else " (--keep-auxiliary keeps it)"
        print(f"left out: {part}{remedy}")
    for note in done.notes:
        print(f"note: {note}")
    print(f"try it: metro generate {done.out} 'A text.'")


@app.command("to-fairseq")
def convert_to_fairseq(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder of a METRO-T5.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to make (.pt).")],
    names: Annotated[
        str | None,
        typer.Option(help="Parameter names: original or metro; default: those it had."),
    ] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face folder as a checkpoint that fairseq trains further.

    Takes exports of this project and the folders that METRO-T0's authors released.
    """
    from metro.models.source import check_model_folder
    from metro.utils.files import check_output

    check_output(out, overwrite, (folder,))
    check_model_folder(folder)
    from metro.conversion.hf_to_fairseq import to_fairseq
    from metro.models.loading import resolve_dtype

    done = to_fairseq(folder, out, names=names, dtype=resolve_dtype(dtype), overwrite=overwrite)
    parts = "main model, auxiliary model, RTD head" if done.has_auxiliary else "main model"
    print(f"{done.out}: {parts} of {done.model}, {done.names} parameter names")
    if done.vocabulary:
        print(
            f"vocabulary: stays in {done.vocabulary} (sp.model, dict.txt); give --vocab "
            f"{done.vocabulary} where DATA is made and where the checkpoint is read"
        )
    else:
        print(f"vocabulary: {folder} has none; DATA needs the model's own sp.model and dict.txt")
    print(f"train it further: fairseq-train DATA --finetune-from-model {done.out} ...")
