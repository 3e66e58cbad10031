"""Weights of pretraining in files: Hugging Face folders, and fairseq checkpoints to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from metro.conversion.fairseq_to_hf import write_checkpoint
from metro.conversion.hf_to_fairseq import NO_HISTORY
from metro.modeling.text_metro_t5 import DICT_FILE
from metro.models.fairseq_checkpoint import FairseqCheckpoint
from metro.models.loading import load
from metro.models.pretraining_model import load_pretraining_model
from metro.models.reading import check_weights
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.model import MetroPretrainingModel, T5PretrainingModel
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import UserError

Model = MetroPretrainingModel | T5PretrainingModel


def write_model(
    model: Model,
    state: Mapping[str, torch.Tensor],
    settings: PretrainingSettings,
    out: Path,
    num_updates: int,
    valid: Mapping[str, float],
    keep_auxiliary: bool,
) -> None:
    """Write the model as `metro convert to-hf` writes one of fairseq.

    Args:
        model: in memory.
        state: its weights, all of them.
        settings: of the run.
        out: the folder to create.
        num_updates: that it was trained for.
        valid: its last validation metrics.
        keep_auxiliary: keep the auxiliary model and the RTD head.
    """
    groups = settings.grouped()
    auxiliary = None
    if settings.is_metro:
        assert settings.generator_layers is not None
        auxiliary = MetroPretrainingConfig.from_options(groups["model"], settings.generator_layers)
    checkpoint = FairseqCheckpoint(
        Path(settings.output_dir),
        "metro",
        groups,
        main={n.removeprefix("main."): t for n, t in state.items() if n.startswith("main.")},
        extra={name: tensor for name, tensor in state.items() if not name.startswith("main.")},
        config=model.config,
        auxiliary=auxiliary,
        history=[{**NO_HISTORY, "num_updates": num_updates}],
        losses={"valid": valid["loss"]} if "loss" in valid else {},
    )
    write_checkpoint(
        checkpoint, out, settings.folders[0], keep_auxiliary=keep_auxiliary, overwrite=True
    )


def load_weights(model: Model, source: Path, settings: PretrainingSettings) -> None:
    """Take the weights of a fairseq checkpoint or a Hugging Face folder.

    Raises:
        UserError: it has another vocabulary or other sizes, or lacks METRO's auxiliary model.
    """
    if not source.exists():
        raise UserError(f"there is no file or folder {source} to take the weights of")
    folder = settings.folders[0]
    dictionary = source / DICT_FILE
    if dictionary.is_file() and dictionary.read_bytes() != (folder / DICT_FILE).read_bytes():
        raise UserError(
            f"{source} has another vocabulary than {folder}: binarise the text with its sp.model "
            "and dict.txt (metro prepare-text --vocab)"
        )
    state: Mapping[str, torch.Tensor]
    if settings.is_metro:
        found = load_pretraining_model(source)
        if found is None:
            raise UserError(
                f"{source} has no auxiliary model, which METRO trains on: give a fairseq "
                "checkpoint, or a folder made with --keep-auxiliary"
            )
        state = found.state_dict()
    else:
        main = load(source, vocab=folder if source.is_file() else None, dtype=torch.float32).model
        state = {f"main.{name}": tensor for name, tensor in main.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_weights(state, expected, str(source), "the model of these settings")
    model.load_state_dict(state)
