"""Log-probabilities of target tokens from hidden states, without logits of the whole vocabulary.

Letters: D width, V vocabulary, W words of a block of it, R rows of the projection, N target tokens
of all pairs.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from metro.utils.messages import UserError


class DecodedRows(NamedTuple):
    """What a batch leaves for the projection: some hidden states, and what is asked of each."""

    hidden_RD: torch.Tensor
    row_N: torch.Tensor
    """Which hidden state predicts the token; several tokens may share one."""
    target_N: torch.Tensor
    """The token."""
    pair_N: torch.Tensor
    """Whose log-probability it is part of: index into the batch's pairs."""


class Projector:
    """Sums log P of target tokens per pair, projecting the rows of several batches at once.

    A product with a large vocabulary is slow for a few rows: rows are collected. Their logits are
    made for a block of words at a time, of which the sum of exponentials stays.
    """

    def __init__(self, scores: torch.Tensor):
        self.scores, self.waiting = scores, []

    def add(self, rows: DecodedRows, index: list[int], weight, bias) -> None:
        """``index``: places of the batch's pairs in the scores."""
        self.projection = weight, bias
        self.waiting.append((rows, torch.tensor(index, device=rows.pair_N.device)))

    @torch.inference_mode()
    def flush(self) -> None:
        if not self.waiting:
            return
        hidden_RD = torch.cat([rows.hidden_RD for rows, _ in self.waiting])
        starts = itertools.accumulate([len(rows.hidden_RD) for rows, _ in self.waiting], initial=0)
        row_N = torch.cat(
            [rows.row_N + start for (rows, _), start in zip(self.waiting, starts, strict=False)]
        )
        target_N = torch.cat([rows.target_N for rows, _ in self.waiting])
        pair_N = torch.cat([index[rows.pair_N] for rows, index in self.waiting])
        log_p_N = target_log_probabilities(hidden_RD, row_N, target_N, *self.projection)
        self.scores.index_add_(0, pair_N.cpu(), log_p_N.double().cpu())
        self.waiting = []


def target_log_probabilities(hidden_RD, row_N, target_N, weight_VD, bias_V=None) -> torch.Tensor:
    """``F.linear(hidden, weight, bias).float().log_softmax(-1)[row, target]`` by blocks of words.

    A target's logit is taken out of its block: in half precision it is rounded just as in the sum
    that it is compared with, so that a certain token has a log-probability of 0.
    """
    # Not a matter of the number of threads, on which the order of the sums would then depend. On
    # the CPU a block's logits (8 MiB) stay near in its caches until they are summed.
    num_logits = 2**21 if hidden_RD.device.type == "cpu" else 2**24
    num_words = max(512, num_logits // len(hidden_RD))
    sorted_N, order_N = target_N.sort(stable=True)
    bounds = [*range(0, len(weight_VD), num_words), len(weight_VD)]
    places = torch.searchsorted(sorted_N, torch.tensor(bounds, device=target_N.device)).tolist()
    if places[0] > 0 or places[-1] < len(target_N):
        raise UserError(
            f"target tokens are {int(sorted_N[0])} to {int(sorted_N[-1])}, but the model knows 0 "
            f"to {len(weight_VD) - 1}; use the tokenizer that belongs to it"
        )
    logit_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_RD.device)
    parts_R = []
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        bias_W = None if bias_V is None else bias_V[first:end]
        logits_RW = F.linear(hidden_RD, weight_VD[first:end], bias_W).float()
        here = order_N[places[number] : places[number + 1]]
        logit_N[here] = logits_RW[row_N[here], target_N[here] - first]
        parts_R.append(logits_RW.logsumexp(-1))
    return logit_N - torch.stack(parts_R).logsumexp(0)[row_N]
