"""``fuse(model)``: the same weights and numbers, computed by the operations of ``metro.ops``."""

from types import MethodType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from metro.modeling.attention_metro_t5 import Attention, Visibility, attend, project_each
from metro.modeling.layers_metro_t5 import (
    AttentionLayer,
    FeedForward,
    FeedForwardLayer,
    add_and_norm,
)
from metro.ops.dispatch import is_eager_cpu
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm
from metro.ops.feed_forward import feed_forward
from metro.ops.linear import packed_linear
from metro.ops.relative_position_attention import relative_position_attention

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Let a METRO model compute its layers with the fused operations, in place.

    These are attention, its projections, the feed-forward network, and dropout with residual and
    LayerNorm. Parameters, their names and the state dict stay as they are: weights can be loaded,
    moved, cast and trained before and after. Layers that were replaced (by adapters, say) are
    called as they are, and calls that ask for the attention weights are computed the plain way.

    Returns:
        the model.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend, module.project = fused_attend, fused_project
        elif isinstance(module, AttentionLayer | FeedForwardLayer):
            module.add_and_norm = fused_add_and_norm
        elif isinstance(module, FeedForward):
            vars(module)["forward"] = MethodType(fused_feed_forward, module)
    return model


def fused_feed_forward(module: FeedForward, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Compute :class:`metro.modeling.layers_metro_t5.FeedForward` by the fused operation."""
    has_dropout = module.training and module.dropout
    wi, wo = module.wi, module.wo
    if has_dropout or module.activation is not F.relu or not are_linear(wi, wo):
        return FeedForward.forward(module, hidden_BTD)
    return feed_forward(hidden_BTD, wi.weight, wi.bias, wo.weight, wo.bias)


def fused_project(x_BTD: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """Compute :func:`metro.modeling.attention_metro_t5.project_each` by the fused operation."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not are_linear(*layers):
        return project_each(x_BTD, *layers)
    return packed_linear(x_BTD, [x.weight for x in linear], [x.bias for x in linear])


def fused_add_and_norm(x, residual, layer_norm: nn.LayerNorm, dropout: float, training: bool):
    """Compute :func:`metro.modeling.layers_metro_t5.add_and_norm` by the fused operation."""
    if type(layer_norm) is not nn.LayerNorm or is_hooked(layer_norm):
        return add_and_norm(x, residual, layer_norm, dropout, training)
    weight, bias = layer_norm.weight, layer_norm.bias
    return dropout_add_layer_norm(x, residual, weight, bias, dropout, layer_norm.eps, training)


def are_linear(*layers: nn.Module) -> bool:
    """Check that layers are as they were built: adapters replace or hook them."""
    return all(type(layer) is nn.Linear and not is_hooked(layer) for layer in layers)


def is_hooked(module: nn.Module) -> bool:
    """Check whether calling a module does more than computing it."""
    forward_hooks = module._forward_hooks or module._forward_pre_hooks
    backward_hooks = module._backward_hooks or module._backward_pre_hooks
    return bool(forward_hooks or backward_hooks) or "forward" in vars(module)


def fused_attend(
    q_BHTK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSK: torch.Tensor,
    bias_HN: torch.Tensor | None,
    visibility: Visibility,
    dropout: float,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute :func:`metro.modeling.attention_metro_t5.attend` by the fused operation."""
    # Without gradients PyTorch's own attention on the CPU keeps nothing either, and needs no second
    # pass; elsewhere the operation chooses.
    serves = is_eager_cpu(q_BHTK) and torch.is_grad_enabled() or q_BHTK.device.type == "cuda"
    if return_weights or not serves:
        return attend(q_BHTK, k_BHSK, v_BHSK, bias_HN, visibility, dropout, return_weights)
    out_BHTK = relative_position_attention(
        q_BHTK,
        k_BHSK,
        v_BHSK,
        bias_HN,
        visibility.key_mask,
        visibility.is_causal,
        visibility.query_positions,
        dropout,
    )
    return out_BHTK, None
