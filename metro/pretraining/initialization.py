"""Initial weights with which a small model learns from a few million tokens.

Nothing here changes the architecture; the defaults leave the weights as they are published. Those
are made for hundreds of billions of tokens: the tokens are 3 % of the variance under the
embedding's LayerNorm, the relative position bias starts at zero and moves too slowly to tell
neighbours apart, and the decoder never finds its place in the encoder's states.

Shapes: D d_model, K width of a head, H heads, R buckets of the relative position bias.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from metro.modeling.attention_metro_t5 import RelativePositionTable
from metro.modeling.layers_metro_t5 import AttentionLayer, PositionTable
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.pretraining.model import MetroPretrainingModel
from metro.utils.messages import UserError

Model = TypeVar("Model", MetroT5ForConditionalGeneration, MetroPretrainingModel)


@dataclass(frozen=True)
class Initialization:
    """Settings of the initial weights, applied by :func:`initialize`.

    Raises:
        UserError: a negative value.
    """

    token_std: float | None = None
    """Standard deviation of the token embeddings."""
    position_std: float | None = None
    """Standard deviation of the position tables."""
    auxiliary_std: float | None = None
    """Standard deviation of the linear layers of the auxiliary model's encoder."""
    neighbour_slope: float = 0.0
    """Slope of the relative position bias around each head's neighbour, see
    :func:`neighbour_bias`; 0: no bias."""
    copy_gain: float = 0.0
    """Gain of a cross-attention that starts by copying, see :func:`copy_by_position`; 0: none."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value >= 0:  # also NaN
                raise UserError(f"init_{name} is {value}; use 0 or more")


@torch.no_grad()
def initialize(model: Model, settings: Initialization) -> Model:
    """Draw the weights of a fresh METRO-T5 or METRO pretraining model again, in place.

    What the settings leave out stays.

    Returns:
        the model.
    """
    for module in model.modules():
        if isinstance(module, RelativePositionTable):
            if settings.neighbour_slope:
                bias = neighbour_bias(
                    module.num_embeddings, module.embedding_dim, settings.neighbour_slope
                )
                module.weight.copy_(bias)
        elif isinstance(module, nn.Embedding):
            is_positions = isinstance(module, PositionTable)
            std = settings.position_std if is_positions else settings.token_std
            if std is not None:
                nn.init.normal_(module.weight, std=std)
                if is_positions:
                    nn.init.zeros_(module.weight[module.padding_idx])
    if settings.auxiliary_std is not None and isinstance(model, MetroPretrainingModel):
        for module in model.auxiliary.encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=settings.auxiliary_std)
    if settings.copy_gain:
        copy_by_position(model, settings.copy_gain)
    return model


def neighbour_bias(num_buckets: int, num_heads: int, slope: float) -> torch.Tensor:
    """R,H: each head starts by looking at one neighbour, ``-slope * |distance - neighbour|``.

    The neighbours of heads 0, 1, 2, 3 ... are at -1, 1, -2, 2 ... tokens, within the distances that
    have a bucket of their own. Farther away the distance is counted in buckets.
    """
    heads = torch.arange(num_heads)
    steps = 1 + (heads // 2) % max(num_buckets // 4 - 1, 1)
    neighbours_H = torch.where(heads % 2 == 0, -steps, steps)
    distances_R = torch.arange(num_buckets) - (num_buckets // 2 - 1)
    return -slope * (distances_R.unsqueeze(1) - neighbours_H).abs()


@torch.no_grad()
def copy_by_position(
    model: MetroT5ForConditionalGeneration | MetroPretrainingModel, gain: float
) -> None:
    """Let every cross-attention start by copying the encoder's state at the decoder's position.

    Positions get the first K columns of the embeddings for themselves, the same rows in encoder and
    decoder, and tokens get the others. Queries and keys are those K columns times ``gain``, in
    every head; values and output are an orthogonal map and its inverse.
    """
    main = model.main if isinstance(model, MetroPretrainingModel) else model
    width = main.config.d_kv
    for module in model.modules():
        if isinstance(module, PositionTable):
            nn.init.zeros_(module.weight[:, width:])
        elif isinstance(module, nn.Embedding) and not isinstance(module, RelativePositionTable):
            nn.init.zeros_(module.weight[:, :width])
    main.decoder.pos_embed.weight.copy_(main.encoder.pos_embed.weight)
    for layer in main.decoder.modules():
        if isinstance(layer, AttentionLayer) and layer.name == "EncDecAttention":
            attention = layer.attention
            queries_HKD = nn.init.zeros_(attention.q.weight).unflatten(0, (-1, width))
            queries_HKD[:, :, :width] = gain * torch.eye(width)
            attention.k.weight.copy_(attention.q.weight)
            nn.init.orthogonal_(attention.v.weight)
            attention.o.weight.copy_(attention.v.weight.T)
