"""`metro convert`: fairseq checkpoints to Hugging Face folders, and back."""

from pathlib import Path

import click

from metro.sharding import SHARDS
from metro.utils.messages import UserError

PATH = click.Path(path_type=Path)
dtype_option = click.option(
    "--dtype", help="float32, bfloat16 or float16; default: every tensor keeps its own."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


@click.group(epilog="\b\nExample:\n  metro convert to-hf checkpoint_best.pt --out model")
def command() -> None:
    """Convert fairseq checkpoints to Hugging Face folders, and back, exactly."""


@command.command(
    "to-hf", epilog="\b\nExample:\n  metro convert to-hf checkpoint_best.pt --out model"
)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder to make.")
@click.option(
    "--vocab", type=PATH, help="Folder with sp.model and dict.txt; default: the training data's."
)
@dtype_option
@click.option("--keep-auxiliary", is_flag=True, help="Keep the auxiliary model and the RTD head.")
@click.option(
    "--cased/--uncased", default=None, help="Keep capitals; default: as the vocabulary was made."
)
@overwrite_option
def convert_to_hf(
    checkpoint: Path,
    out: Path,
    vocab: Path | None,
    dtype: str | None,
    keep_auxiliary: bool,
    cased: bool | None,
    overwrite: bool,
) -> None:
    """Write a checkpoint as a Hugging Face folder that loads anywhere.

    Takes checkpoints of this project and of the original METRO-T0 code, adapters of PEFT (a folder
    or hub id), which are merged into their base model, and checkpoint-N folders of metro pretrain
    and metro finetune with --fsdp.
    """
    from metro.data.text.vocabulary import read_vocabulary
    from metro.models.source import check_file, model_source
    from metro.utils.files import check_output

    check_output(out, overwrite, (checkpoint,))  # here too, before seconds of imports
    if (checkpoint / SHARDS).is_dir():
        if vocab or cased is not None:
            raise UserError("--vocab and --cased are for fairseq checkpoints: leave them out")
        count = join_shards(checkpoint, out, dtype, keep_auxiliary)
        click.echo(f"{out}: {count:,} parameters, joined")
        return
    is_adapter = not checkpoint.is_file() and checkpoint.suffix != ".pt"
    if is_adapter:
        model_source(checkpoint)
    else:
        check_file(checkpoint)
    if vocab:
        read_vocabulary(vocab)
    from metro.conversion.export import merge_to_hf
    from metro.conversion.fairseq_to_hf import to_hf
    from metro.models.loading import resolve_dtype

    if is_adapter:
        if keep_auxiliary or cased is not None:
            raise UserError("--keep-auxiliary and --cased are for fairseq checkpoints: leave out")
        model = merge_to_hf(
            checkpoint, out, vocab=vocab, dtype=resolve_dtype(dtype), overwrite=overwrite
        )
        click.echo(f"{out}: {model.num_parameters():,} parameters in {model.dtype}, merged")
        return
    done = to_hf(
        checkpoint,
        out,
        vocab=vocab,
        dtype=resolve_dtype(dtype),
        keep_auxiliary=keep_auxiliary,
        lower=None if cased is None else not cased,
        overwrite=overwrite,
    )
    case = "lowercases" if done.lower else "keeps capitals"
    click.echo(f"{done.out}: {done.num_parameters:,} parameters in {done.dtype}")
    click.echo(f"vocabulary: {done.vocabulary} ({case})")
    for part in done.dropped:
        remedy = "" if "optimizer" in part else " (--keep-auxiliary keeps it)"
        click.echo(f"left out: {part}{remedy}")
    for note in done.notes:
        click.echo(f"note: {note}")
    click.echo(f"try it: metro generate {done.out} 'A text.'")


def join_shards(checkpoint: Path, out: Path, dtype: str | None, keep_auxiliary: bool) -> int:
    """Join a sharded checkpoint-N, of whichever command; return its number of parameters."""
    from metro.finetuning import output_folder as finetuning
    from metro.models.loading import resolve_dtype
    from metro.training import pretrain as pretraining
    from metro.training.output_folder import TRAINER_STATE, check_checkpoint

    if not (checkpoint / TRAINER_STATE).is_file():
        raise UserError(f"{checkpoint} is not complete: give the checkpoint before it")
    check_checkpoint(checkpoint)
    if (checkpoint.parent / pretraining.SETTINGS).is_file():
        return pretraining.join_shards(checkpoint, out, resolve_dtype(dtype), keep_auxiliary)
    if not (checkpoint.parent / finetuning.SETTINGS).is_file():
        raise UserError(
            f"{checkpoint.parent} has neither {pretraining.SETTINGS} nor {finetuning.SETTINGS}: "
            "give the checkpoint within the output folder of its run"
        )
    from metro.finetuning.run import join_shards as of_finetuning

    if keep_auxiliary:
        raise UserError("--keep-auxiliary is for pretraining: leave it out")
    return of_finetuning(checkpoint, out, resolve_dtype(dtype))


@command.command(
    "to-fairseq", epilog="\b\nExample:\n  metro convert to-fairseq model --out checkpoint.pt"
)
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, required=True, help="Checkpoint to make (.pt).")
@click.option("--names", help="Parameter names: original or metro; default: those of the export.")
@dtype_option
@overwrite_option
def convert_to_fairseq(
    folder: Path, out: Path, names: str | None, dtype: str | None, overwrite: bool
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
    click.echo(f"{done.out}: {parts} of {done.model}, {done.names} parameter names")
    if done.vocabulary:
        click.echo(
            f"vocabulary: stays in {done.vocabulary} (sp.model, dict.txt); give --vocab "
            f"{done.vocabulary} where DATA is made and where the checkpoint is read"
        )
    else:
        click.echo(f"vocabulary: {folder} has none; DATA needs the model's sp.model and dict.txt")
    for part in done.dropped:
        click.echo(f"left out, as fairseq has no place for them: {part}")
    click.echo(f"train it further: fairseq-train DATA --finetune-from-model {done.out} ...")
