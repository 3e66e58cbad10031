"""Sums of a row of logits, shared by :mod:`metro.ops.linear_cross_entropy` and its kernels."""

from typing import NamedTuple

import torch


class RowSums(NamedTuple):
    """Sums kept of each row's logits: losses and gradients follow from it."""

    target_logit: torch.Tensor
    normaliser: torch.Tensor
    """log of the sum of the exponentials."""
    others: torch.Tensor
    """``1 - p_target``, the share of the other tokens, as the sum of theirs."""
    logit_sum: torch.Tensor | None
    """Of all logits, where asked for."""
    most_probable: torch.Tensor | None
    """Token id of the highest logit; the gradient does not need it."""


class Coefficients(NamedTuple):
    """A row's gradient of the logits: ``scale * p + shift``, and ``at_target`` at the target."""

    scale: torch.Tensor
    shift: torch.Tensor
    at_target: torch.Tensor
    normaliser: torch.Tensor
