"""Log-probabilities of target tokens from hidden states, without logits of the whole vocabulary.

Shapes: D width, V vocabulary, W entries of a block of it, R hidden states, N target tokens of all
pairs.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from metro.ops.linear import linear
from metro.utils.messages import UserError

BLOCK = 512
"""Entries of the vocabulary at a time on the CPU, multiples of it on GPUs. Fewer make small
products, more leave a core's cache, and odd numbers take a third longer."""


class Decoded(NamedTuple):
    """Decoder output: hidden states, and the target tokens that each predicts."""

    hidden_RD: torch.Tensor
    row_N: torch.Tensor
    """Index of the hidden state that predicts the token; several tokens may share one."""
    target_N: torch.Tensor
    """The token."""
    pair_N: torch.Tensor
    """Index of the pair whose log-probability it is part of."""
    weight_VD: torch.Tensor
    """Weight of the projection to the vocabulary."""
    bias_V: torch.Tensor | None


def concatenate(parts: Sequence[Decoded]) -> Decoded:
    """Join decoder outputs: a product with a large vocabulary is slow for a few hidden states."""
    starts = itertools.accumulate((len(part.hidden_RD) for part in parts), initial=0)
    return Decoded(
        torch.cat([part.hidden_RD for part in parts]),
        torch.cat([part.row_N + start for part, start in zip(parts, starts, strict=False)]),
        torch.cat([part.target_N for part in parts]),
        torch.cat([part.pair_N for part in parts]),
        *parts[0][4:],
    )


@torch.inference_mode()
def add_log_probabilities(scores_P: torch.Tensor, parts: Sequence[Decoded]) -> None:
    """Add log P of the target tokens to the scores of their pairs, in place."""
    hidden_RD, row_N, target_N, pair_N, weight_VD, bias_V = concatenate(parts)
    log_p_N = target_log_probabilities(hidden_RD, row_N, target_N, weight_VD, bias_V)
    scores_P.index_add_(0, pair_N.cpu(), log_p_N.double().cpu())


@torch.inference_mode()
def add_misses(misses_P: torch.Tensor, parts: Sequence[Decoded]) -> None:
    """Add to each pair, in place, how many of its target tokens are not the most probable ones."""
    hidden_RD, row_N, target_N, pair_N, weight_VD, bias_V = concatenate(parts)
    size = max(1, 2**24 // len(weight_VD))
    best_R = torch.cat(
        [F.linear(each_RD, weight_VD, bias_V).argmax(-1) for each_RD in hidden_RD.split(size)]
    )
    misses_P.index_add_(0, pair_N.cpu(), (best_R[row_N] != target_N).double().cpu())


def target_log_probabilities(
    hidden_RD: torch.Tensor,
    row_N: torch.Tensor,
    target_N: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """``F.linear(hidden, weight, bias).float().log_softmax(-1)[row, target]``, N values.

    The logits exist for a block of the vocabulary at a time; its sum of exponentials is kept. A
    target's logit is taken out of its block: in half precision it is rounded just as in the sum
    that it is compared with, so that a certain token has a log-probability of 0.

    Raises:
        UserError: a target token is outside of the vocabulary.
    """
    # Independent of the number of threads: the block size decides the order of the sums.
    size = BLOCK
    if hidden_RD.device.type != "cpu":
        size *= max(1, 2**24 // len(hidden_RD) // BLOCK)
    sorted_N, order_N = target_N.sort(stable=True)
    bounds = [*range(0, len(weight_VD), size), len(weight_VD)]
    splits = torch.searchsorted(sorted_N, torch.tensor(bounds, device=target_N.device)).tolist()
    if splits[0] > 0 or splits[-1] < len(target_N):
        raise UserError(
            f"target tokens are {int(sorted_N[0])} to {int(sorted_N[-1])}, but the model knows 0 "
            f"to {len(weight_VD) - 1}; use the model's own tokenizer"
        )
    logit_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_RD.device)
    parts_R = []
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        bias_W = None if bias_V is None else bias_V[first:end]
        logits_RW = linear(hidden_RD, weight_VD[first:end], bias_W).float()
        here = order_N[splits[number] : splits[number + 1]]
        logit_N[here] = logits_RW[row_N[here], target_N[here] - first]
        parts_R.append(spent_logsumexp(logits_RW))
    return logit_N - torch.stack(parts_R).logsumexp(0)[row_N]


def spent_logsumexp(logits_RW: torch.Tensor) -> torch.Tensor:
    """``logits.logsumexp(-1)``, writing over the logits, by softmax: twice as fast on the CPU.

    Relative to the largest logit the sum of the exponentials is one over the largest share.
    """
    largest_R = logits_RW.amax(-1)
    return largest_R - torch.softmax(logits_RW, -1, out=logits_RW).amax(-1).log()
