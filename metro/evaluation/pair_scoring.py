"""Log-probabilities of targets given sources, none computed twice.

Shared are: the encoding of a source by all its targets (a channel's source "Yes" serves a whole
task), the decoder's first step and the keys and values that it makes of the source, a hidden state
by the options that begin there, a pair that turns up again. Pairs are batched by length within a
budget of tokens, so that the result does not depend on their order. The vocabulary's logits exist
for a chunk of rows only.

Letters: U sources, P pairs, S source tokens, T target tokens, D width, V vocabulary, R rows of the
projection, C rows of a chunk of them, N target tokens of all pairs.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from metro.finetuning.projection import projection_input

IGNORED = -100


class Pair(NamedTuple):
    """What one score needs: log P(target | source)."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    """With end symbol, without start symbol."""


class Batch(NamedTuple):
    """Pairs that go through the model together."""

    sources: list[tuple[int, ...]]
    pairs: list[tuple[int, tuple[int, ...]]]
    """(index into sources, target)"""


def make_batches(pairs: Sequence[Pair], batch_tokens: int) -> list[Batch]:
    """Distinct pairs in batches of similar length, the longest first.

    A batch has at most ``batch_tokens`` tokens, sources counted once per pair (their keys and
    values are repeated) and padding included; a single longer pair is a batch of its own.
    """
    targets: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for source, target in sorted(set(pairs), key=lambda pair: (-len(pair.target), pair.target)):
        targets.setdefault(source, []).append(target)
    groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
    for source, options in targets.items():  # a source with very many targets is cut
        size = max(1, batch_tokens // (len(source) + len(options[0])))
        groups += [(source, options[i : i + size]) for i in range(0, len(options), size)]
    # Target lengths in steps of 8: sources of one length stay together.
    groups.sort(key=lambda group: (-(len(group[1][0]) // 8), -len(group[0]), group))
    batches: list[Batch] = []
    longest_source = longest_target = 0
    for source, options in groups:
        longest_source = max(longest_source, len(source))
        longest_target = max(longest_target, len(options[0]))
        cost = longest_source + longest_target
        if not batches or (len(batches[-1].pairs) + len(options)) * cost > batch_tokens:
            batches.append(Batch([], []))
            longest_source, longest_target = len(source), len(options[0])
        batch = batches[-1]
        batch.pairs.extend((len(batch.sources), option) for option in options)
        batch.sources.append(source)
    return batches


def group_batches(batches: Sequence[Batch], target_tokens: int = 256) -> list[list[Batch]]:
    """Neighbouring batches that are projected to the vocabulary together."""
    groups: list[list[Batch]] = []
    size = 0
    for batch in batches:
        if not groups or size >= target_tokens:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += sum(len(target) for _, target in batch.pairs)
    return groups


def pad(rows: Sequence[Sequence[int]], value: int, device) -> torch.Tensor:
    """Rows of ids as one tensor, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


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

    A product with a large vocabulary is slow for a few rows, and its logits (R, V) should never be
    many: rows are collected, then projected in chunks.
    """

    chunk_logits = 2**24

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
        weight_VD, bias_V = self.projection
        hidden_RD = torch.cat([rows.hidden_RD for rows, _ in self.waiting])
        starts = itertools.accumulate([len(rows.hidden_RD) for rows, _ in self.waiting], initial=0)
        row_N = torch.cat(
            [rows.row_N + start for (rows, _), start in zip(self.waiting, starts, strict=False)]
        )
        target_N = torch.cat([rows.target_N for rows, _ in self.waiting])
        pair_N = torch.cat([index[rows.pair_N] for rows, index in self.waiting])
        log_p_N = torch.empty_like(target_N, dtype=torch.float32)
        step = max(1, self.chunk_logits // len(weight_VD))
        for first in range(0, len(hidden_RD), step):
            logits_CV = F.linear(hidden_RD[first : first + step], weight_VD, bias_V).float()
            normalizer_C = logits_CV.logsumexp(-1)
            here = ((row_N >= first) & (row_N < first + step)).nonzero().squeeze(-1)
            local_row = row_N[here] - first
            log_p_N[here] = logits_CV[local_row, target_N[here]] - normalizer_C[local_row]
        self.scores.index_add_(0, pair_N.cpu(), log_p_N.double().cpu())
        self.waiting = []


@torch.inference_mode()
def decode_batch(model, batch: Batch):
    """Hidden states that predict the targets of a batch, and the projection's weight and bias."""
    device, config = model.device, model.config
    start, filler = config.decoder_start_token_id, config.pad_token_id
    source_ids_US = pad(batch.sources, filler, device)
    lengths_U = torch.tensor([len(source) for source in batch.sources], device=device)
    mask_US = torch.arange(source_ids_US.shape[1], device=device) < lengths_U[:, None]
    mask_US = mask_US.long()
    encoded = model.get_encoder()(input_ids=source_ids_US, attention_mask=mask_US, return_dict=True)
    owner_P = torch.tensor([owner for owner, _ in batch.pairs], device=device)
    targets = [target for _, target in batch.pairs]
    target_ids_PT = pad(targets, IGNORED, device)
    if len(batch.pairs) > len(batch.sources):
        return decode_shared_sources(model, encoded, mask_US, owner_P, targets, target_ids_PT)
    # Nothing to share behind the encoder. One row of ids serves all where they are alike.
    rows = targets[:1] if len(set(targets)) == 1 else targets
    input_ids_PT = pad([[start, *row[:-1]] for row in rows], filler, device)
    hidden_PTD, weight, bias = projection_input(
        model,
        encoder_outputs=encoded,
        attention_mask=mask_US,
        decoder_input_ids=input_ids_PT.expand(len(targets), -1),
    )
    pair_N, place_N = (target_ids_PT != IGNORED).nonzero(as_tuple=True)
    row_N = torch.arange(len(pair_N), device=device)
    rows = DecodedRows(hidden_PTD[pair_N, place_N], row_N, target_ids_PT[pair_N, place_N], pair_N)
    return rows, weight, bias


def decode_shared_sources(model, encoded, mask_US, owner_P, targets, target_ids_PT):
    """:func:`decode_batch` where sources have several targets each.

    The first decoder step, which reads the start symbol, is run once per source and leaves the keys
    and values of the source behind; the other steps take copies of them.
    """
    num_sources, start = len(mask_US), model.config.decoder_start_token_id
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first_U1D, weight, bias = projection_input(
        model,
        encoder_outputs=encoded,
        attention_mask=mask_US,
        decoder_input_ids=mask_US.new_full((num_sources, 1), start),
        past_key_values=cache,
        use_cache=True,
    )
    pair_P = torch.arange(len(targets), device=mask_US.device)
    first = DecodedRows(first_U1D[:, 0], owner_P, target_ids_PT[:, 0], pair_P)
    if target_ids_PT.shape[1] == 1:
        return first, weight, bias
    cache.batch_select_indices(owner_P)
    hidden_PTD, weight, bias = projection_input(
        model,
        encoder_outputs=BaseModelOutput(encoded[0][owner_P]),
        attention_mask=mask_US[owner_P],
        decoder_input_ids=pad(
            [target[:-1] or target for target in targets], model.config.pad_token_id, mask_US.device
        ),
        past_key_values=cache,
        use_cache=True,
    )
    pair_N, place_N = (target_ids_PT[:, 1:] != IGNORED).nonzero(as_tuple=True)
    hidden_ND = hidden_PTD[pair_N, place_N]
    row_N = num_sources + torch.arange(len(pair_N), device=mask_US.device)
    rows = DecodedRows(
        torch.cat([first.hidden_RD, hidden_ND]),
        torch.cat([first.row_N, row_N]),
        torch.cat([first.target_N, target_ids_PT[pair_N, place_N + 1]]),
        torch.cat([first.pair_N, pair_N]),
    )
    return rows, weight, bias


class PairScorer:
    """Scores pairs, each distinct one once.

    Args:
        model: any sequence-to-sequence model of Hugging Face, in eval mode.
        batch_tokens: tokens of a batch, padding included.
        rank, num_processes: which share of the batches is this process's.
        gather: adds up a float64 tensor over the processes.
    """

    def __init__(
        self,
        model,
        *,
        batch_tokens: int = 4096,
        rank: int = 0,
        num_processes: int = 1,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; use at least 1")
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise ValueError(
                f"{type(model).__name__} has no decoder_start_token_id in its configuration; set it"
            )
        self.model, self.batch_tokens = model, batch_tokens
        self.rank, self.num_processes, self.gather = rank, num_processes, gather
        self.known: dict[Pair, float] = {}
        self.num_computed = 0

    def forget(self) -> None:
        """Drop the remembered scores, e.g. where another task begins."""
        self.known.clear()

    def score(
        self, pairs: Sequence[Pair], *, progress: Callable[[float], None] | None = None
    ) -> list[float]:
        """log P(target | source) of every pair; ``progress`` is told the share that is done."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        # Shared out by groups, which do not depend on the number of processes: nor do the scores,
        # to the last bit.
        groups = group_batches(make_batches(new, self.batch_tokens))
        places = {pair: number for number, pair in enumerate(new)}
        scores = torch.zeros(len(new), dtype=torch.float64)
        done, size = 0, sum(len(pair.source) + len(pair.target) for pair in new)
        for number, group in enumerate(groups):
            projector = Projector(scores)
            for batch in group:
                if number % self.num_processes == self.rank:
                    index = [places[Pair(batch.sources[owner], t)] for owner, t in batch.pairs]
                    rows, weight, bias = decode_batch(self.model, batch)
                    projector.add(rows, index, weight, bias)
                if progress is not None:
                    done += sum(len(t) + len(batch.sources[owner]) for owner, t in batch.pairs)
                    progress(done / size)
            projector.flush()
        if self.gather is not None:
            scores = self.gather(scores)
        self.num_computed += len(new)
        self.known.update(zip(new, scores.tolist(), strict=True))
        return [self.known[pair] for pair in pairs]
