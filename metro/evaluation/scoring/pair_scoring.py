"""Log-probabilities of targets given sources, none computed twice.

Computed once are: the encoding of a source for all its targets (a channel's source "Yes" serves a
whole task), the decoder's first step and its keys and values of the source, and a pair that occurs
again. Pairs are batched by length within a budget of tokens, so that the result does not depend on
their order.

METRO models on the CPU use ``packed_scoring.py``, which shares more.

Shapes: U sources, P pairs, S source tokens, T target tokens, D width, N target tokens of all pairs.
"""

import math
from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from metro.evaluation.scoring.packed_scoring import can_pack, decode_packed
from metro.evaluation.scoring.pair_batches import (
    Batch,
    Pair,
    group_batches,
    make_batches,
    make_packed_batches,
)
from metro.evaluation.scoring.target_projection import (
    Decoded,
    add_log_probabilities,
    add_misses,
    concatenate,
)
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.models.placement import input_device
from metro.models.projection import (
    padding,
    projection_input,
    refused_if_it_fails,
    start_token,
    with_states,
)
from metro.utils.messages import UserError

IGNORED = -100


def pad(rows: Sequence[Sequence[int]], value: int, device) -> torch.Tensor:
    """Stack sequences of ids, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


@torch.inference_mode()
def decode_batch(model, batch: Batch) -> Decoded:
    """Compute the hidden states that predict the targets of a batch, padded."""
    device, start, filler = input_device(model), start_token(model), padding(model)
    source_ids_US = pad(batch.sources, filler, device)
    lengths_U = torch.tensor([len(source) for source in batch.sources], device=device)
    mask_US = (torch.arange(source_ids_US.shape[1], device=device) < lengths_U[:, None]).long()
    encoded = model.get_encoder()(input_ids=source_ids_US, attention_mask=mask_US, return_dict=True)
    owner_P = torch.tensor([owner for owner, _ in batch.pairs], device=device)
    targets = [target for _, target in batch.pairs]
    target_ids_PT = pad(targets, IGNORED, device)
    if len(batch.pairs) > len(batch.sources):
        if not hasattr(model.config, "expert_capacity"):
            return decode_shared_sources(model, encoded, mask_US, owner_P, targets, target_ids_PT)
        # Experts drop what is beyond their capacity, counted over all of a target.
        encoded, mask_US = with_states(encoded, encoded[0][owner_P]), mask_US[owner_P]
    # Nothing to share behind the encoder. Equal targets are expanded from one.
    distinct = targets[:1] if len(set(targets)) == 1 else targets
    input_ids_PT = pad([[start, *target[:-1]] for target in distinct], filler, device)
    hidden_PTD, weight, bias = projection_input(
        model,
        encoder_outputs=encoded,
        attention_mask=mask_US,
        decoder_input_ids=input_ids_PT.expand(len(targets), -1),
    )
    return where_targets_are(target_ids_PT, hidden_PTD, weight, bias)


def where_targets_are(target_ids_PT, hidden_PTD, weight, bias) -> Decoded:
    """Keep the hidden states of target tokens, on their device: that of the projection."""
    target_ids_PT = target_ids_PT.to(hidden_PTD.device)
    pair_N, position_N = (target_ids_PT != IGNORED).nonzero(as_tuple=True)
    row_N = torch.arange(len(pair_N), device=hidden_PTD.device)
    hidden_ND, target_N = hidden_PTD[pair_N, position_N], target_ids_PT[pair_N, position_N]
    return Decoded(hidden_ND, row_N, target_N, pair_N, weight, bias)


def decode_shared_sources(model, encoded, mask_US, owner_P, targets, target_ids_PT) -> Decoded:
    """:func:`decode_batch` where sources have several targets each.

    The first decoder step, which reads the start symbol, is run once per source and caches the keys
    and values of the source; the other steps use copies of them.
    """
    num_sources, start = len(mask_US), start_token(model)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first_U1D, weight, bias = projection_input(
        model,
        encoder_outputs=encoded,
        attention_mask=mask_US,
        decoder_input_ids=mask_US.new_full((num_sources, 1), start),
        past_key_values=cache,
        use_cache=True,
    )
    pair_P = torch.arange(len(targets), device=first_U1D.device)
    of_first = owner_P.to(pair_P.device), target_ids_PT[:, 0].to(pair_P.device)
    first = Decoded(first_U1D[:, 0], *of_first, pair_P, weight, bias)
    if target_ids_PT.shape[1] == 1:
        return first
    cache.batch_select_indices(owner_P)
    hidden_PTD, weight, bias = projection_input(
        model,
        encoder_outputs=with_states(encoded, encoded[0][owner_P]),
        attention_mask=mask_US[owner_P],
        decoder_input_ids=pad(
            [target[:-1] or target for target in targets], padding(model), mask_US.device
        ),
        past_key_values=cache,
        use_cache=True,
    )
    return concatenate([first, where_targets_are(target_ids_PT[:, 1:], hidden_PTD, weight, bias)])


def check_scores(model) -> None:
    """Score two short texts in each of the ways of :func:`decode_batch`, before work is done.

    Raises:
        UserError: the model is of a kind that fails, or whose scores differ between the ways.
    """
    start_token(model)
    if isinstance(model, MetroT5ForConditionalGeneration):
        return
    source, *targets = (3, 4, 5), (4, 5, 6), (5, 6, 4)
    batches = [Batch([source], [(0, targets[0])]), Batch([source], [(0, t) for t in targets])]
    scores = [torch.zeros(2, dtype=torch.float64) for _ in batches]
    with refused_if_it_fails(model):
        for batch, found in zip(batches, scores, strict=True):
            add_log_probabilities(found, [decode_batch(model, batch)])
    first, again = (float(found[0]) for found in scores)
    if math.isfinite(first) and abs(first - again) > 0.1 + 0.02 * abs(first):
        raise UserError(
            f"{type(model).__name__} cannot be evaluated: the same text scores {first:.3f} or "
            f"{again:.3f}, as its cache of past tokens changes its numbers; use another model"
        )


class NotFinite(UserError):
    """A score is NaN or infinite: no number of this model can be trusted."""

    def __init__(self, score: float, of: str = "a text"):
        super().__init__(
            f"the log-probability of {of} is {score}: weights or activations of the model are not "
            "finite; use another dtype (bfloat16 or float32 instead of float16) or checkpoint"
        )
        self.score = score


class PairScorer:
    """Scores pairs, each distinct one once.

    Args:
        model: any sequence-to-sequence model of Hugging Face, in eval mode.
        batch_tokens: tokens of a batch, padding included.
        rank, num_processes: this process computes every ``num_processes``-th group of batches.
        gather: adds up a float64 tensor over the processes.
        with_misses: also count, in ``misses``, the target tokens that are not most probable.

    Raises:
        UserError: ``batch_tokens`` is not positive, the model has no start symbol, or is of a kind
            whose scores cannot be computed here.
    """

    def __init__(
        self,
        model,
        *,
        batch_tokens: int = 4096,
        rank: int = 0,
        num_processes: int = 1,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
        with_misses: bool = False,
    ):
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}; use at least 1")
        check_scores(model)
        self.model, self.batch_tokens = model, batch_tokens
        self.rank, self.num_processes, self.gather = rank, num_processes, gather
        self.known: dict[Pair, float] = {}
        self.with_misses = with_misses
        self.misses: dict[Pair, int] = {}
        """Of the pairs scored so far; 0: a greedy decoder writes the target."""

    def forget(self) -> None:
        """Drop the remembered scores, e.g. before another task."""
        self.known.clear()
        self.misses.clear()

    def score(
        self, pairs: Sequence[Pair], *, progress: Callable[[float], None] | None = None
    ) -> list[float]:
        """Compute log P(target | source) of every pair.

        Args:
            pairs: in any order.
            progress: receives the share of the work that is done.

        Raises:
            NotFinite: a score is NaN or infinite.
        """
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        # Groups do not depend on the number of processes, so neither do the scores: to the last bit
        # with equal numbers of threads, which decide the order of sums.
        packs = can_pack(self.model)
        batches = (make_packed_batches if packs else make_batches)(new, self.batch_tokens)
        positions = {pair: number for number, pair in enumerate(new)}
        scores, misses = torch.zeros(2, len(new), dtype=torch.float64)
        done, size = 0, sum(len(pair.source) + len(pair.target) for pair in new)
        for number, group in enumerate(group_batches(batches)):
            parts = []
            for batch in group:
                if number % self.num_processes == self.rank:
                    part = (decode_packed if packs else decode_batch)(self.model, batch)
                    index = [positions[Pair(batch.sources[owner], t)] for owner, t in batch.pairs]
                    pair_N = torch.tensor(index, device=part.pair_N.device)[part.pair_N]
                    parts.append(part._replace(pair_N=pair_N))
                if progress is not None:
                    done += sum(len(t) + len(batch.sources[owner]) for owner, t in batch.pairs)
                    progress(done / size)
            if parts:
                add_log_probabilities(scores, parts)
                if self.with_misses:
                    add_misses(misses, parts)
        if self.gather is not None:
            scores = self.gather(scores)
            misses = self.gather(misses) if self.with_misses else misses
        if bool((bad := ~scores.isfinite()).any()):
            raise NotFinite(float(scores[bad][0]))
        self.known.update(zip(new, scores.tolist(), strict=True))
        if self.with_misses:
            self.misses.update(zip(new, map(int, misses.tolist()), strict=True))
        return [self.known[pair] for pair in pairs]
