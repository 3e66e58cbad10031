"""What a sequence-to-sequence model feeds into its output embedding.

Losses and scores need the probability of one token per position. With the hidden states and the
projection's weight they can be computed in pieces; the model's own logits (B, T, V) never exist.

Letters: B batch, T target tokens, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import NamedTuple

import torch
from torch import nn

from metro.utils.messages import UserError


class ProjectionInput(NamedTuple):
    """`hidden @ weight.T + bias` are the model's logits."""

    hidden_BTD: torch.Tensor
    """The decoder's output, scaled as the model scales it."""
    weight_VD: torch.Tensor
    """The output embedding, in the hidden states' type."""
    bias_V: torch.Tensor | None
    """Bias of the output embedding and `final_logits_bias`, where the model has one."""


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def projection_input(model: nn.Module, **forward_kwargs) -> ProjectionInput:
    """Run `model(**forward_kwargs)` without its output projection.

    For any sequence-to-sequence model of Hugging Face, METRO's and one wrapped for several
    processes; `encoder_outputs=` may be given as usual. The output embedding is put back before
    this returns.

    Raises:
        ValueError: the model has no output embedding, or changes its logits after the projection.
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
    if inner not in _checked:  # once per model: comparing waits for the device
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


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of several processes or of `torch.compile`."""
    while True:
        if isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
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
