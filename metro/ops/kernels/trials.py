"""Small awkward inputs of each operation that has kernels, for
:mod:`metro.ops.kernels.self_check`.

Odd lengths, several tiles, a row of the batch that sees no key, targets to ignore, and what the
caller's case has of optional inputs. What a kernel drops is read off its results: the formula with
just that dropped then has to give the same outputs and the same gradients.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from metro.ops.dispatch import KERNEL_TYPES, reason_against_kernel
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm as normalise
from metro.ops.kernels.self_check import Trial, both_passes, find_fault, seed
from metro.ops.linear_cross_entropy import linear_cross_entropy as cross_entropy
from metro.ops.linear_sample_cross_entropy import linear_sample_cross_entropy as sample_and_loss
from metro.ops.relative_position_attention import (
    bias_of_pairs,
    visible_keys,
)
from metro.ops.relative_position_attention import (
    relative_position_attention as attend,
)

TRAINED: dict[str, list[tuple[str, ...]]] = {
    "relative_position_attention": [
        ("bias", "dropout", "mask"),
        ("bias", "dropout"),
        ("bias", "mask"),
        ("bias",),
        ("bias", "mask", "positions"),
        ("bias", "positions"),
        ("dropout", "mask"),
        ("mask",),
        ("causal", "dropout", "positions"),
        ("causal", "dropout", "mask"),
    ],
    "dropout_add_layer_norm": [("dropout",), (), ("dropout", "mixed"), ("mixed",)],
    "linear_cross_entropy": [("bias",), ()],
    "linear_sample_cross_entropy": [("bias",)],
}
"""Operation -> the optional inputs that training and evaluation give it, the most in front.

``mixed``: a residual in float32 beside half precision, as under autocast.
"""
WIDTHS = {"relative_position_attention": 64}
"""Of METRO-base: of a head, elsewhere 768."""
RATE = 0.3125
"""Of dropout; a multiple of 2 ** -16, not a half, where kept and dropped could be exchanged."""
KEYS = 330
"""With keys so far away that their bias is one number."""
COUNT = 2000
"""Tokens drawn from one distribution."""


def drawn(device: torch.device, dtype: torch.dtype, **shapes: tuple[int, ...]):
    """Normally distributed numbers, others for each name."""
    tensors = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**31)
        tensors[name] = torch.randn(shape, generator=generator).to(device, dtype)
    return tensors


def relative_position_attention(device, dtype, width, flags) -> Trial:
    batch, heads, queries, keys = 2, 2, 70, KEYS
    of_keys = (batch, keys, heads, width)
    leaves = drawn(device, dtype, q=(batch, queries, heads, width), k=of_keys, v=of_keys)
    leaves = {name: x.transpose(1, 2) for name, x in leaves.items()}
    if "bias" in flags:
        near = drawn(device, dtype, bias=(heads, 97))["bias"]
        distances = torch.arange(1 - keys, keys, device=device).clamp(-48, 48)
        leaves["bias"] = near[:, distances]
    mask = positions = None
    if "mask" in flags:
        mask = torch.zeros(batch, keys, dtype=torch.bool, device=device)
        mask[0, 3:100] = True
    if "positions" in flags:
        positions = (torch.arange(batch * queries, device=device) * 37 % keys).view(batch, queries)
    rate, is_causal = RATE * ("dropout" in flags), "causal" in flags

    def kernel(q, k, v, bias=None):
        return [attend(q, k, v, bias, mask, is_causal, positions, rate, "triton")]

    visible = visible_keys(leaves["q"], leaves["k"], mask, is_causal, positions)
    visible = (
        torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device) if visible is None else visible
    )
    visible = visible.expand(batch, heads, queries, keys)
    shares, kept = None, torch.ones_like(visible)
    if rate:  # values of ones and zeros show which weights are kept, some keys at a time
        parts = []
        for one in torch.eye(keys, device=device, dtype=dtype).split(width, 1):
            seed(device)
            values = F.pad(one, (0, width - one.shape[1])).expand_as(leaves["v"])
            parts.append(kernel(**leaves | {"v": values})[0][..., : one.shape[1]] != 0)
        kept = torch.cat(parts, -1)
        count = int(visible.sum())
        shares = share_of(kept[visible].double(), count)

    def formula(q, k, v, bias=None):
        scores, lowest = q @ k.transpose(-1, -2) / width**0.5, torch.finfo(q.dtype).min
        if bias is None:
            weights = scores.masked_fill(~visible, lowest).softmax(-1).where(visible, 0.0)
        else:  # as the reference: a query that sees nothing gets the mean of all values
            pairs = bias_of_pairs(bias, keys, queries, positions)
            weights = (scores + pairs.masked_fill(~visible, lowest)).softmax(-1)
        return [(weights * kept / (1.0 - rate)) @ v]

    return Trial(leaves, kernel, formula, shares)


def dropout_add_layer_norm(device, dtype, width, flags) -> Trial:
    shapes = {"residual": (37, width), "weight": (width,), "bias": (width,)}
    leaves = drawn(device, dtype, x=(37, width))
    leaves |= drawn(device, torch.float32 if "mixed" in flags else dtype, **shapes)
    rate = RATE * ("dropout" in flags)

    def kernel(x, residual, weight, bias):
        return [normalise(x, residual, weight, bias, rate, impl="triton")]

    shares, kept = None, torch.ones_like(leaves["x"], dtype=torch.bool)
    if rate:  # what is dropped has no gradient
        kept = both_passes(kernel, leaves)["gradient of x"] != 0
        shares = share_of(kept.double(), kept.numel())

    def formula(x, residual, weight, bias):
        x = (x * kept / (1.0 - rate)).to(x.dtype)
        return [F.layer_norm(residual + x, (width,), weight, bias)]

    return Trial(leaves, kernel, formula, shares)


def linear_cross_entropy(device, dtype, width, flags) -> Trial:
    leaves, targets = projection(device, dtype, width, flags)

    def run(hidden, weight, bias=None, impl="plain"):
        loss, correct = cross_entropy(
            hidden, weight, targets, bias_V=bias, label_smoothing=0.1, impl=impl
        )
        return [loss, correct.to(loss.dtype)]

    return Trial(leaves, lambda **given: run(**given, impl="triton"), run)


def linear_sample_cross_entropy(device, dtype, width, flags) -> Trial:
    leaves, targets = projection(device, dtype, width, flags)

    def run(hidden, weight, bias=None, targets=targets, impl="plain"):
        seeds = torch.arange(len(targets), device=device)
        return sample_and_loss(hidden, weight, targets, seeds, seeds % 7, bias_V=bias, impl=impl)

    def kernel(**given):
        got = run(**given, impl="triton")
        return [got.loss, got.correct.to(got.loss.dtype), got.samples.to(got.loss.dtype)]

    samples = run(**leaves, impl="triton").samples

    def formula(**given):
        got = run(**given)
        return [got.loss, got.correct.to(got.loss.dtype), samples.to(got.loss.dtype)]

    few = {name: x[:40] for name, x in leaves.items() if name != "hidden"}
    hidden = leaves["hidden"][:1]
    logits = F.linear(hidden.double(), *(x.double() for x in few.values()))[0]
    many = run(hidden.expand(COUNT, -1), **few, targets=targets.new_zeros(COUNT), impl="triton")
    observed = torch.bincount(many.samples, minlength=40)[:40].double() / COUNT
    return Trial(leaves, kernel, formula, (observed, logits.softmax(-1), COUNT))


def projection(device, dtype, width, flags) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Hidden states, a projection of several parts of the vocabulary, and targets to ignore.

    Every second target is the most probable token.
    """
    vocabulary = 2100
    leaves = drawn(device, dtype, hidden=(70, width), weight=(vocabulary, width))
    leaves["weight"] /= width**0.5
    if "bias" in flags:
        leaves |= drawn(device, dtype, bias=(vocabulary,))
    exact = [x.double() for x in leaves.values()]
    targets = torch.arange(70, device=device) * 29
    targets[::2] = F.linear(*exact).argmax(-1)[::2]
    targets[5::31] = -100
    return leaves, targets


def share_of(kept: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    return kept.mean(), torch.full_like(kept.mean(), 1.0 - RATE), count


def verdicts(device: torch.device) -> Iterator[dict[str, Any]]:
    """Try each operation's fullest case in each type, and say which of its cases ``auto`` takes.

    Returns:
        ``operation``, ``type``, ``fault`` (``None``: it works), ``used`` (the optional inputs of
        the cases that are taken) and ``reason``, why the fullest is not (empty: it is).
    """
    for (op, cases), dtype in itertools.product(TRAINED.items(), KERNEL_TYPES):
        width, against = WIDTHS.get(op, 768), {}
        try:
            fault = find_fault(op, device, dtype, width, cases[0])
            for flags in cases:
                against[flags] = reason_against_kernel(op, device, dtype, width, *flags)
        except torch.OutOfMemoryError:
            fault = "not tried: the GPU has no memory left"
        yield {
            "operation": op,
            "type": str(dtype).removeprefix("torch."),
            "fault": fault,
            "used": [" ".join(flags) for flags, reason in against.items() if not reason],
            "reason": against.get(cases[0], fault),
        }
