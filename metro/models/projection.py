"""Input of the output embedding of any sequence-to-sequence model.

Losses and scores need the probability of one token per position. With the hidden states and the
projection's weight they can be computed in pieces; the model's own logits (B, T, V) never exist.

Shapes: B batch, T target tokens, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from metro.utils.messages import UserError


class ProjectionInput(NamedTuple):
    """The model's logits are `hidden @ weight.T + bias`."""

    hidden_BTD: torch.Tensor
    """(B, T, D) output of the decoder, scaled as the model scales it."""
    weight_VD: torch.Tensor
    """(V, D) output embedding, in the dtype of the hidden states."""
    bias_V: torch.Tensor | None
    """(V) bias of the output embedding and `final_logits_bias`, where the model has one."""


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def projection_input(model: nn.Module, **forward_kwargs) -> ProjectionInput:
    """Run `model(**forward_kwargs)` without its output projection.

    Works for any sequence-to-sequence model of Hugging Face, METRO's included, also wrapped for
    several processes; `encoder_outputs=` may be given as usual. The output embedding is put back
    before this returns.

    Raises:
        UserError: the model has no output embedding, or changes its logits after the projection.
    """
    inner = unwrap(model)
    head = inner.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UserError(
            f"{type(inner).__name__} has no output embedding; use a sequence-to-sequence model for "
            "generation (…ForConditionalGeneration)"
        )
    caught: list[torch.Tensor] = []

    def pass_through(hidden):
        caught.append(hidden)
        return hidden

    with _replaced_forward(head, pass_through), _without_final_bias(inner) as final_bias:
        output = model(**{"use_cache": False, "return_dict": True, **forward_kwargs})
    if len(caught) != 1:
        raise UserError(
            f"{type(inner).__name__} called its output embedding {len(caught)} times instead of "
            "once; it cannot be used here"
        )
    hidden_BTD = caught[0]
    if inner not in _checked:  # once per model: comparing synchronises with the GPU
        if not torch.equal(output.logits.to(hidden_BTD.dtype), hidden_BTD):
            raise UserError(
                f"{type(inner).__name__} changes its logits after the output embedding (soft "
                "capping?), which this computation would miss; use another model"
            )
        _checked.add(inner)
    bias_V = getattr(head, "bias", None)
    if final_bias is not None:
        bias_V = final_bias if bias_V is None else bias_V + final_bias
    weight_VD = head.weight.to(hidden_BTD.dtype)
    return ProjectionInput(hidden_BTD, weight_VD, bias_V)


def unwrap(model: nn.Module) -> Any:
    """Return the model inside the wrappers of distributed training or `torch.compile`."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward):
    """Let `module(x)` be `forward(x)`; whatever accelerate has put there is restored."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def _without_final_bias(model: nn.Module):
    """BART and its relatives add the buffer `final_logits_bias` (1, V) to the logits."""
    bias = model._buffers.get("final_logits_bias")
    if bias is None:
        yield None
        return
    model._buffers["final_logits_bias"] = bias.new_zeros(())
    try:
        yield bias[0]
    finally:
        model._buffers["final_logits_bias"] = bias
