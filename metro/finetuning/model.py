"""The model as it is finetuned: loaded, checked, set up, and with LoRA's adapters.

LoRA (Hu et al., 2021): PEFT trains adapters of all linear layers, the weights stay.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from metro.data.own_prompts import own_choices
from metro.finetuning.objectives import scoring_method
from metro.finetuning.output_folder import DATA
from metro.finetuning.settings import FinetuningSettings
from metro.fusion import fuse
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.models.loading import LoadedModel, load
from metro.models.projection import projection_input, refused_if_it_fails, start_token
from metro.models.source import ANSWER_CHOICES, SCORING_METHOD
from metro.utils.messages import MissingPackage, UserError

LINEAR_LAYERS = "all-linear"
"""PEFT's name for them; the output projection is not one, as it is tied to the embedding."""


def load_trainable(
    settings: FinetuningSettings, half: bool = False, device: torch.device | None = None
) -> LoadedModel:
    """Load the model that is finetuned, in float32.

    Args:
        settings: of the run.
        half: compute rounded weights (``load_in``) in bfloat16.
        device: of rounded weights.

    Raises:
        UserError: it cannot be loaded or trained; the message says what it lacks.
    """
    loaded = load(
        settings.model,
        dtype=torch.bfloat16 if settings.load_in and half else torch.float32,
        device=device if settings.load_in else None,
        load_in=settings.load_in,
        attn_implementation=settings.attn_implementation,
        vocab=settings.vocab,
    )
    _check_trainable(*loaded)
    return loaded


def _check_trainable(model, tokenizer) -> None:
    """Refuse models without the special tokens of the loss, or that fail on a short text."""
    pad = getattr(model.config, "pad_token_id", None)
    if pad is None or pad == tokenizer.eos_token_id:
        raise UserError(
            f"{type(model).__name__} cannot be trained: its pad_token_id is {pad}, and must be a "
            "token of its own, different from the end symbol; set it in config.json"
        )
    ids = torch.tensor([[3, 4, 5]], device=model.device)
    start = torch.full_like(ids, start_token(model))
    with refused_if_it_fails(model), torch.no_grad():
        projection_input(model, input_ids=ids, decoder_input_ids=start)


def set_up_for_training(model, settings: FinetuningSettings):
    """Set start symbol, fused operations and dropout; note method and choices; add adapters.

    Returns:
        The model, or with ``lora`` one around it whose adapters alone require gradients.
    """
    setattr(model.generation_config, SCORING_METHOD, scoring_method(settings.objective))
    choices = own_choices(Path(settings.output_dir) / DATA) if settings.asks_own_rows else {}
    if choices or hasattr(model.generation_config, ANSWER_CHOICES):  # of an earlier finetuning
        setattr(model.generation_config, ANSWER_CHOICES, choices)
    if isinstance(model.config, MetroT5Config):
        # after pretraining it is <sen000>; a prompt-finetuned METRO-T0 starts with </s>
        start = model.config.eos_token_id
        model.config.decoder_start_token_id = start
        model.generation_config.decoder_start_token_id = start
        model.generation_config.eos_token_id = start
        fuse(model)
    if settings.dropout is not None:
        _set_dropout(model, settings.dropout)
    model.config.use_cache = True
    return _with_adapters(model.train(), settings) if settings.lora else model.train()


def _set_dropout(model, dropout: float) -> None:
    """Use one dropout rate everywhere but after activations, which keep their own."""
    config = model.config
    for name in ("dropout_rate", "dropout", "attention_dropout_rate", "attention_dropout"):
        if isinstance(getattr(config, name, None), float | int):
            setattr(config, name, float(dropout))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(vars(module).get("dropout"), float) and not hasattr(module, "activation"):
            vars(module)["dropout"] = dropout


def _with_adapters(model, settings: FinetuningSettings):
    """Add adapters; dropout, start symbol and fused operations of the model stay."""
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage("--lora", "peft", "peft")
    import peft

    path = Path(settings.model)
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        base_model_name_or_path=str(path.resolve() if path.exists() else settings.model),
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LINEAR_LAYERS,
    )
    return peft.get_peft_model(model, config)
