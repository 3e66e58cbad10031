"""A model as it is scored: loaded as the settings say, with all that decides its numbers."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metro.evaluation.settings import ScoringSettings
from metro.evaluation.tasks.protocol import Protocol, choose_protocol
from metro.fusion import fuse
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.models.loading import LoadedModel, fast_dtype, load
from metro.models.placement import input_device, is_dispatched
from metro.models.projection import width_of
from metro.models.registry import RegisteredModel, find_registered
from metro.models.source import trained_method
from metro.ops.dispatch import LEAST_BF16_WIDTH
from metro.utils.identity import model_identity


class ScoredModel(NamedTuple):
    """A model and how its answer choices are scored."""

    name: str
    """As the user gave it."""
    registered: RegisteredModel | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str]
    """Digests of weights, configuration and tokenizer."""
    dtype: str
    """Of the weights."""
    method: str
    protocol: Protocol
    batch_tokens: int
    is_own_method: bool
    """The model was trained for the method, and nobody chose another."""

    def describe(self) -> str:
        """Say how it is scored, for the log."""
        why = ", which the model was trained for" if self.is_own_method else ""
        protocol = self.protocol.describe()
        faster = " (--precision fast: bfloat16, which is faster here)" * self.would_gain()
        return f"method {self.method}{why}; protocol {protocol}; weights in {self.dtype}{faster}"

    def would_gain(self) -> bool:
        """Whether float32 was chosen where bfloat16 is faster."""
        if self.dtype != "float32" or width_of(self.model) < LEAST_BF16_WIDTH:
            return False
        return fast_dtype(input_device(self.model)) == torch.bfloat16


def open_model(
    name: str | LoadedModel, settings: ScoringSettings, device: torch.device
) -> ScoredModel:
    """Load a model, unless it is loaded already, and choose its method and protocol.

    Raises:
        UserError: there is no such model, or its weights are not finite.
    """
    if isinstance(name, LoadedModel):
        model, tokenizer = name
        name = str(model.name_or_path)
    else:
        model, tokenizer = load(
            name,
            dtype=settings.dtype,
            attn_implementation=settings.attention,
            vocab=settings.vocab,
            **settings.placed(device),
        )
    registered, method = find_registered(name), settings.method_of(name)
    protocol = choose_protocol(
        settings.protocol or (registered.family if registered else None),
        model.config,
        method,
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
        truncation_side=settings.truncation_side,
    )
    identity, dtype = model_identity(model, tokenizer), str(model.dtype).removeprefix("torch.")
    if settings.load_in is not None:
        dtype = f"{settings.load_in} {dtype}"
    is_cuda = input_device(model).type == "cuda"
    if is_cuda and isinstance(model.config, MetroT5Config) and not is_dispatched(model):
        fuse(model)  # on the CPU packed_scoring.py does more
    batch_tokens = settings.batch_tokens or (65536 if is_cuda else 4096)
    is_own_method = settings.method is None and trained_method(name) is not None
    return ScoredModel(
        *(name, registered, model, tokenizer, identity, dtype),
        *(method, protocol, batch_tokens, is_own_method),
    )
