"""``fuse(model)``: the same weights and numbers, computed with the operations of ``metro.ops``."""

import torch
from torch import nn

from metro.modeling.attention_metro_t5 import Attention, Visibility, attend
from metro.modeling.layers_metro_t5 import AttentionLayer, FeedForwardLayer
from metro.ops.dispatch import is_eager_cpu
from metro.ops.dropout import dropout
from metro.ops.relative_position_attention import relative_position_attention


def fuse(model: nn.Module) -> nn.Module:
    """Let every attention and dropout of a METRO model use the fused operations, in place.

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
    return model


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
