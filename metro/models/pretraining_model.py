"""What METRO pretraining has left beside the main model: auxiliary model and RTD head."""

import os
from pathlib import Path
from typing import cast

import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.models.fairseq_checkpoint import (
    PRETRAINING_WEIGHTS,
    TIED,
    kept_pretraining_weights,
    read_checkpoint,
    read_training,
    shared_with_main,
)
from metro.models.loading import read_config
from metro.models.reading import read_folder
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.model import MetroPretrainingModel


def load_pretraining_model(path_or_name: str | os.PathLike) -> MetroPretrainingModel | None:
    """Load auxiliary model, main model and RTD head, of what METRO pretraining has left.

    Args:
        path_or_name: a fairseq checkpoint ``.pt``, or an export made with ``--keep-auxiliary``.

    Returns:
        The model in evaluation mode; None for models that are, or have kept, nothing of the kind.

    Raises:
        UserError: the files are damaged or do not belong together.
    """
    path = Path(path_or_name)
    pretraining: MetroPretrainingConfig | None = None
    if path.is_file():
        checkpoint = read_checkpoint(path)
        config, pretraining = checkpoint.config, checkpoint.auxiliary
        main, extra = checkpoint.main, checkpoint.extra
    elif (path / PRETRAINING_WEIGHTS).is_file():
        config = cast(MetroT5Config, read_config(path))
        settings = read_training(path).get("settings") or {"model": {}}
        extra, pretraining = kept_pretraining_weights(path, settings, config)
        main = read_folder(path)
    if pretraining is None:
        return None
    model = MetroPretrainingModel(config, pretraining)
    # Both readers have checked names and shapes; shared tensors may be there under one name only.
    state = {f"main.{name}": tensor for name, tensor in main.items()}
    found = model.load_state_dict({**state, **extra}, strict=False)
    shared = {*(f"main.{name}" for name in TIED), *shared_with_main(pretraining)}
    assert not found.unexpected_keys and {*found.missing_keys} <= shared
    return model.eval()


def load_rtd_head(path_or_name: str | os.PathLike) -> torch.nn.Module | None:
    """Load the head of replaced token detection; None where there is none."""
    model = load_pretraining_model(path_or_name)
    return None if model is None else model.rtd_head
