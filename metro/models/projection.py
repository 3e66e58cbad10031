"""What losses and scores need of any sequence-to-sequence model: above all, its projection's input.

Losses and scores need the probability of one token per position. With the hidden states and the
projection's weight they can be computed in pieces; the model's own logits (B, T, V) never exist.

Shapes: B batch, T target tokens, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from metro.utils.messages import UserError

Result = TypeVar("Result", bound=tuple)


class ProjectionInput(NamedTuple):
    """The model's logits are `hidden @ weight.T + bias`."""

    hidden_BTD: torch.Tensor
    """(B, T, D) output of the decoder, scaled as the model scales it."""
    weight_VD: torch.Tensor
    """(V, D) output embedding, in the dtype of the hidden states."""
    bias_V: torch.Tensor | None
    """(V) bias of the output embedding and `final_logits_bias`, where the model has one."""


class PositionLimits(NamedTuple):
    """Longest sequences of a model; None where positions are relative (T5)."""

    encoder: int | None
    decoder: int | None

    def lengths(self, source: int, target: int) -> tuple[int, int]:
        """Return these lengths, or the model's where they are less."""
        return min(source, self.encoder or source), min(target, self.decoder or target)


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def projection_input(model: nn.Module, **forward_kwargs) -> ProjectionInput:
    """Run `model(**forward_kwargs)` without its output projection; see :func:`at_projection`."""
    return at_projection(model, lambda projected: projected, **forward_kwargs)


def at_projection(
    model: nn.Module, compute: Callable[[ProjectionInput], Result], **forward_kwargs
) -> Result:
    """Run `model(**forward_kwargs)` and compute something else in place of its output projection.

    `compute` runs where the projection would, so that its weight is there, also where it is sharded
    over processes or offloaded. The first of the tensors that it returns, (B, T, ...), takes the
    place of the logits: gradients of a sharded model go through it.

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
    results: list[Result] = []

    def compute_here(hidden_BTD: torch.Tensor) -> torch.Tensor:
        bias_V = getattr(head, "bias", None)
        if final_bias is not None:
            final_bias_V = final_bias.to(hidden_BTD.dtype)  # a buffer, which stays float32
            bias_V = final_bias_V if bias_V is None else bias_V + final_bias_V
        weight_VD = head.weight.to(hidden_BTD.dtype)
        results.append(compute(ProjectionInput(hidden_BTD, weight_VD, bias_V)))
        return results[-1][0]

    with _replaced_forward(head, compute_here), _without_final_bias(inner) as final_bias:
        output = model(**{"use_cache": False, "return_dict": True, **forward_kwargs})
    if len(results) != 1:
        raise UserError(
            f"{type(inner).__name__} called its output embedding {len(results)} times instead of "
            "once; it cannot be used here"
        )
    if inner not in _checked:  # once per model: comparing synchronises with the GPU
        first = results[0][0]
        logits = output.logits.to(first)
        if not torch.allclose(logits, first, rtol=0, atol=0, equal_nan=True):
            raise UserError(
                f"{type(inner).__name__} changes its logits after the output embedding (soft "
                "capping?), which this computation would miss; use another model"
            )
        _checked.add(inner)
    # The same tensor as the model returned it: with the hooks of engines that shard weights.
    return results[0]._replace(**{results[0]._fields[0]: output.logits})  # type: ignore[attr-defined]


def unwrap(model: nn.Module) -> Any:
    """Return the model inside the wrappers of distributed training, `torch.compile` or PEFT."""
    if hasattr(model, "peft_config") and callable(base := getattr(model, "get_base_model", None)):
        return base()  # with the adapters in its layers
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


def start_token(model: nn.Module) -> int:
    """Return the decoder's first input.

    Raises:
        UserError: the model does not name it.
    """
    inner = unwrap(model)
    for settings in (inner.config, getattr(inner, "generation_config", None)):
        start = getattr(settings, "decoder_start_token_id", None)
        if start is not None:
            return start
    raise UserError(
        f"the configuration of {type(inner).__name__} has no decoder_start_token_id; set it in its "
        "config.json"
    )


def padding(model: nn.Module) -> int:
    """Return an id to fill up sequences with: the model's padding, or any, as it is never seen."""
    return getattr(unwrap(model).config, "pad_token_id", None) or 0


def width_of(model: nn.Module) -> int:
    """Return the width of a model's embeddings: configurations have several names for it."""
    return unwrap(model).get_input_embeddings().embedding_dim


def position_limits(config) -> PositionLimits:
    """Return the lengths of a model's position tables."""
    found = []
    for side in ("encoder", "decoder"):
        own = getattr(config, side, None)
        names = ("max_positions", f"max_{side}_position_embeddings", "max_position_embeddings")
        values = [getattr(each, name, None) for each in (config, own) if each for name in names]
        tables = [value for value in values if isinstance(value, int) and value > 0]
        found.append(tables[0] if tables else None)
    return PositionLimits(*found)


def with_states(encoded, states: torch.Tensor):
    """Return an encoder's output with other hidden states (B, S, D) and nothing else in it.

    Of the model's own type, as decoders look for more than hidden states: mixtures of experts for
    the router's decisions.
    """
    kind = type(encoded) if isinstance(encoded, ModelOutput) else BaseModelOutput
    return kind(last_hidden_state=states)


@contextlib.contextmanager
def refused_if_it_fails(model: nn.Module):
    """Turn what a model of another kind raises on its first, short text into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{type(unwrap(model)).__name__} cannot be used here, it does not read and write text "
            f"as sequence-to-sequence models do ({reason}); use another model"
        ) from error


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward):
    """Let `module(x)` be `forward(x)`, inside of what accelerate has wrapped it in."""
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    before = vars(module).get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


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
