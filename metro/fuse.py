"""``fuse(model)``: the same weights and numbers, computed with the operations of ``metro.ops``."""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn

from metro.modeling.attention_metro_t5 import Attention, Visibility, attend
from metro.modeling.layers_metro_t5 import AttentionLayer, FeedForward, FeedForwardLayer
from metro.ops.dispatch import is_eager_cpu
from metro.ops.dropout import dropout
from metro.ops.feed_forward import feed_forward
from metro.ops.relative_position_attention import relative_position_attention


def fuse(model: nn.Module) -> nn.Module:
    """Let attention, feed-forward and dropout of a METRO model use the fused operations, in place.

    Parameters, their names and the state dict stay as they are. Calls that ask for the attention
    weights are computed the plain way.

    Returns:
        the model.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = fused_attend
        elif isinstance(module, AttentionLayer | FeedForwardLayer):
            module.drop = dropout
        elif isinstance(module, FeedForward):
            module.forward = MethodType(fused_feed_forward, module)
    return model


def fused_feed_forward(module: FeedForward, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """:class:`metro.modeling.layers_metro_t5.FeedForward` by the fused operation."""
    has_dropout = module.training and module.dropout
    # Adapters replace the layers.
    is_plain = type(module.wi) is nn.Linear and type(module.wo) is nn.Linear
    if (
        has_dropout
        or module.activation is not F.relu
        or not is_plain
        or not is_eager_cpu(hidden_BTD)
    ):
        return FeedForward.forward(module, hidden_BTD)
    wi, wo = module.wi, module.wo
    return feed_forward(hidden_BTD, wi.weight, wi.bias, wo.weight, wo.bias)


def fused_attend(
    q_BHTK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSK: torch.Tensor,
    bias_HN: torch.Tensor | None,
    visibility: Visibility,
    attention_dropout: float,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`metro.modeling.attention_metro_t5.attend` by the fused operation."""
    # Without gradients PyTorch's own attention keeps nothing either, and needs no second pass; on
    # other devices it is the only implementation so far.
    if return_weights or not torch.is_grad_enabled() or not is_eager_cpu(q_BHTK):
        return attend(
            q_BHTK, k_BHSK, v_BHSK, bias_HN, visibility, attention_dropout, return_weights
        )
    out_BHTK = relative_position_attention(
        q_BHTK,
        k_BHSK,
        v_BHSK,
        bias_HN,
        visibility.key_mask,
        visibility.is_causal,
        visibility.query_positions,
        attention_dropout,
    )
    return out_BHTK, None
