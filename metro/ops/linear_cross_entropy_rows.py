"""Sums of a row of logits, shared by :mod:`metro.ops.linear_cross_entropy` and its kernels.

Shapes: C rows of a chunk, V vocabulary. Logits of half precision are summed in float32.
"""

from typing import NamedTuple

import torch

from metro.ops.threads import for_each

CACHED_LOGITS = 2**18
"""On the CPU each core reduces so many at a time: 1 MiB, which its cache keeps for all passes."""


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


def sums_of_chunk(logits_CV: torch.Tensor, targets_C: torch.Tensor, needs_sum: bool) -> list:
    """Sum up a chunk, few rows at a time."""
    few_rows = in_cache(logits_CV)
    found: list[RowSums | None] = [None] * len(few_rows)

    def sum_up(number: int) -> None:
        rows = few_rows[number]
        found[number] = sums_of(widened(logits_CV[rows]), targets_C[rows], needs_sum)

    for_each(sum_up, range(len(few_rows)))
    return found


def sums_of(logits_CV: torch.Tensor, targets_C: torch.Tensor, needs_sum: bool) -> RowSums:
    """Sum up rows, whose target logits are taken out and put back."""
    targets_C1 = targets_C.unsqueeze(-1)
    target_logits_C1 = logits_CV.gather(-1, targets_C1)
    target_logits_C = target_logits_C1.squeeze(-1)
    if logits_CV.device.type == "cpu":  # NumPy finds it in a quarter of PyTorch's time
        most_probable_C = torch.from_numpy(logits_CV.numpy().argmax(-1))
    else:
        most_probable_C = logits_CV.argmax(-1)
    logit_sum_C = logits_CV.sum(-1) if needs_sum else None
    log_others_C = logits_CV.scatter_(-1, targets_C1, -torch.inf).logsumexp(-1)
    logits_CV.scatter_(-1, targets_C1, target_logits_C1)
    normaliser_C = torch.logaddexp(log_others_C, target_logits_C)
    others_C = (log_others_C - normaliser_C).exp()
    return RowSums(target_logits_C, normaliser_C, others_C, logit_sum_C, most_probable_C)


def logits_gradient(logits_CV, targets_C, row: Coefficients) -> torch.Tensor:
    """Compute the gradient that :class:`Coefficients` describes, in place of the logits."""
    normaliser_C1, scale_C1, shift_C1 = (
        x.unsqueeze(-1) for x in (row.normaliser, row.scale, row.shift)
    )

    def derive(rows: slice) -> None:
        grad_CV = widened(logits_CV[rows]).sub_(normaliser_C1[rows]).exp_()
        grad_CV.mul_(scale_C1[rows]).add_(shift_C1[rows])
        if grad_CV.dtype != logits_CV.dtype:
            logits_CV[rows] = grad_CV

    for_each(derive, in_cache(logits_CV))
    # Not scatter_: on the CPU it widens all logits of half precision, and rounds them again.
    row_C = torch.arange(len(targets_C), device=targets_C.device)
    return logits_CV.index_put_((row_C, targets_C), row.at_target.to(logits_CV.dtype))


def in_cache(logits_CV: torch.Tensor) -> list[slice]:
    """Split the rows into few at a time on the CPU, at least one slice; a GPU takes them all."""
    num_rows, vocab_size = logits_CV.shape
    step = CACHED_LOGITS // vocab_size if logits_CV.device.type == "cpu" else num_rows
    return [slice(i, i + max(step, 1)) for i in range(0, max(num_rows, 1), max(step, 1))]


def widened(logits: torch.Tensor) -> torch.Tensor:
    """In at least float32; what has it already is not copied."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
