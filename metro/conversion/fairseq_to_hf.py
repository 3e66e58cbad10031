"""Convert a fairseq checkpoint, of the original METRO-T0 code or this project, to Hugging Face."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from metro.conversion.export import write_folder
from metro.conversion.model_card import model_card
from metro.conversion.training_facts import summary, training_file, training_rows
from metro.models.fairseq_checkpoint import (
    PRETRAINING_WEIGHTS,
    FairseqCheckpoint,
    generation_config,
    read_checkpoint,
    shared_with_main,
    untied,
)
from metro.models.vocabulary_folder import build_tokenizer, find_vocabulary
from metro.utils.files import check_output


@dataclass
class Conversion:
    """Facts about a written folder."""

    out: Path
    num_parameters: int
    """Of the model, shared weights counted once; the auxiliary model is not counted."""
    dtype: str
    """Of the embedding matrix."""
    vocabulary: Path
    """Folder that the vocabulary came from."""
    lower: bool
    """True if the tokenizer lowercases texts."""
    dropped: list[str] = field(default_factory=list)
    """Descriptions of the checkpoint's parts that are not in the export."""
    notes: list[str] = field(default_factory=list)
    """Caveats for the user."""


def to_hf(
    checkpoint_path: str | Path,
    out: str | Path,
    *,
    vocab: str | Path | None = None,
    dtype: torch.dtype | None = None,
    keep_auxiliary: bool = False,
    lower: bool | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write a fairseq checkpoint as a Hugging Face folder.

    Args:
        checkpoint_path: the ``.pt`` file.
        out: the folder to create.
        vocab: folder with ``sp.model`` and ``dict.txt``; by default found through the checkpoint.
        dtype: of the weights; by default each tensor keeps its own.
        keep_auxiliary: keep auxiliary model and RTD head, in a separate file.
        lower: lowercase texts; by default as the vocabulary folder says.
        overwrite: replace an existing ``out``.

    Raises:
        UserError: ``out`` exists, or the files are damaged or do not belong together.
    """
    path, out = Path(checkpoint_path), Path(out)
    check_output(out, overwrite, (path,))
    checkpoint = read_checkpoint(path)
    folder = Path(vocab) if vocab else find_vocabulary(checkpoint.task, path)
    return write_checkpoint(
        checkpoint,
        out,
        folder,
        dtype=dtype,
        keep_auxiliary=keep_auxiliary,
        lower=lower,
        overwrite=overwrite,
    )


def write_checkpoint(
    checkpoint: FairseqCheckpoint,
    out: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    keep_auxiliary: bool = False,
    lower: bool | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write what a checkpoint holds as a Hugging Face folder.

    Args:
        checkpoint: read from a file, or made of a model in memory.
        out: the folder to create.
        folder: with ``sp.model`` and ``dict.txt``.
        dtype, keep_auxiliary, lower, overwrite: see :func:`to_hf`.

    Raises:
        UserError: ``out`` exists, or model and vocabulary do not belong together.
    """
    count = checkpoint.task.get("tokens_per_sample")
    tokenizer = build_tokenizer(folder, checkpoint.config.vocab_size, count, lower)

    weights = cast(untied(checkpoint.main), dtype)
    shared = shared_with_main(checkpoint.auxiliary) if checkpoint.auxiliary else {}
    extra = {name: tensor for name, tensor in checkpoint.extra.items() if name not in shared}
    result = Conversion(
        out,
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        dtype=str(weights["shared.weight"].dtype).removeprefix("torch."),
        vocabulary=folder,
        lower=tokenizer.lower,
        notes=checkpoint.notes,
    )
    if extra and not keep_auxiliary:
        heads = " and the RTD head" if any(name.startswith("rtd_head") for name in extra) else ""
        size = sum(tensor.numel() for tensor in extra.values())
        result.dropped.append(f"the auxiliary model{heads} ({size:,} parameters)")
    result.dropped.append("the optimizer state")
    rows = training_rows(checkpoint, folder)
    if extra:
        place = f"in `{PRETRAINING_WEIGHTS}`" if keep_auxiliary else "left out"
        rows["auxiliary model and RTD head"] = place
    card = model_card(out.name, summary(checkpoint), checkpoint.config, weights, rows)
    write_folder(
        out,
        checkpoint.config,
        generation_config(checkpoint),
        weights,
        tokenizer,
        card,
        overwrite,
        pretraining_weights=cast(extra, dtype) if keep_auxiliary else None,
        training=training_file(checkpoint),
        inputs=(checkpoint.path, folder),
    )
    return result


def cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Convert floating point tensors to a type; ``None`` changes nothing."""
    if dtype is None:
        return tensors
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
