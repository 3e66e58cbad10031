"""LoRA (Hu et al., 2021): PEFT trains adapters of all linear layers, the weights stay."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from metro.finetuning.settings import FinetuningSettings
from metro.utils.messages import MissingPackage

LINEAR_LAYERS = "all-linear"
"""PEFT's name for them; the output projection is not one, as it is tied to the embedding."""


def add_adapters(model, settings: FinetuningSettings):
    """Return the model with adapters, which alone require gradients.

    Args:
        model: as it is trained: dropout, start symbol and fused operations stay.
        settings: rank, scale and dropout.

    Raises:
        MissingPackage: PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage("--lora", "peft", "peft")
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        base_model_name_or_path=str(_absolute(settings.model)),
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LINEAR_LAYERS,
    )
    return peft.get_peft_model(model, config)


def _absolute(model: str) -> str | Path:
    return Path(model).resolve() if Path(model).exists() else model


def write_adapter(model, weights, tokenizer, folder: Path) -> None:
    """Write the adapter, the tokenizer, and how the model is asked: its start symbol."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    model.get_base_model().generation_config.save_pretrained(folder)
