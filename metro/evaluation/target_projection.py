"""Log-probabilities of target tokens from hidden states, without logits of the whole vocabulary.

Letters: D width, V vocabulary, W words of a block of it, R rows of the projection, N target tokens
of all pairs.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F


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
        weight_VD, bias_V = self.projection
        logit_N = (hidden_RD[row_N].float() * weight_VD[target_N].float()).sum(-1)
        if bias_V is not None:
            logit_N += bias_V[target_N].float()
        log_p_N = logit_N - log_normalizer(hidden_RD, weight_VD, bias_V)[row_N]
        self.scores.index_add_(0, pair_N.cpu(), log_p_N.double().cpu())
        self.waiting = []


def log_normalizer(hidden_RD, weight_VD, bias_V=None) -> torch.Tensor:
    """``F.linear(hidden, weight, bias).float().logsumexp(-1)``, a block of words at a time."""
    on_cpu = hidden_RD.device.type == "cpu"
    # On the CPU a block's logits (4 MiB a core) stay in its cache until they are summed.
    num_logits = 2**20 * torch.get_num_threads() if on_cpu else 2**24
    num_words = max(512, num_logits // len(hidden_RD))
    weights_WD = weight_VD.split(num_words)
    biases_W = [None] * len(weights_WD) if bias_V is None else bias_V.split(num_words)
    parts_R = [
        F.linear(hidden_RD, weight_WD, bias_W).float().logsumexp(-1)
        for weight_WD, bias_W in zip(weights_WD, biases_W, strict=True)
    ]
    return torch.stack(parts_R).logsumexp(0)
