"""Corruption of a sequence for pretraining: BERT-style masking and T5-style span corruption.

Masking feeds METRO's auxiliary model (Bajaj et al. 2022, "METRO: Efficient Denoising Pretraining of
Large Scale Autoencoding Language Models with Model Generated Signals"); span corruption is the
objective of plain T5 (Raffel et al. 2020, section 3.1.4). The order of the random draws is that of
the published implementation, so that a run sees the same corrupted text as the original did.

Every item has its own legacy NumPy generator, seeded by (seed, epoch, index); the global generator
is neither read nor written. `numpy.random.RandomState(s)` yields the stream that
`numpy.random.seed(s)` would, and its stream is frozen by NumPy's compatibility policy (NEP 19).

Shapes: N tokens of one sequence, R randomly replaced tokens, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np


class MaskedTokens(NamedTuple):
    """A masked sequence and where it was masked."""

    masked_ids: np.ndarray
    """int64 [N]: the input of the auxiliary model."""
    is_masked: np.ndarray
    """bool [N]: chosen positions, including those that kept their token."""


class CorruptedSpans(NamedTuple):
    """Source and target of span corruption."""

    input_ids: np.ndarray
    """int64: the sequence with every chosen span replaced by one sentinel."""
    target_ids: np.ndarray
    """int64: every sentinel followed by the tokens it stands for, closed by `<sen000>`."""


def item_seed(seed: int, epoch: int, index: int) -> int:
    """Derive the seed in [0, 1e6) of one item in one epoch, as fairseq's `numpy_seed` does.

    It rests on Python's hash of a tuple of integers, the same on every 64-bit CPython >= 3.8.
    """
    return int(hash((int(seed), int(epoch), int(index))) % 1e6)


def item_random(seed: int, epoch: int, index: int) -> np.random.RandomState:
    """Return the generator that all draws for one item in one epoch come from."""
    return np.random.RandomState(item_seed(seed, epoch, index))


def sampling_seed(seed: int, epoch: int, index: int) -> int:
    """Derive the seed in [0, 2**63) with which the auxiliary model samples tokens for one item.

    It depends on nothing but its arguments, so a sample is the same whichever batch, rank or
    accumulation step its item lands in. Unlike `item_seed` it practically never collides.
    """
    state = np.random.SeedSequence((int(seed), int(epoch), int(index))).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@lru_cache(maxsize=8)
def _random_token_cdf(vocab_size: int, num_special: int) -> np.ndarray:
    """Cumulative distribution [V] of a random token: uniform over all but the special ids."""
    weights_V = np.ones(vocab_size)
    weights_V[:num_special] = 0
    cdf_V = (weights_V / weights_V.sum()).cumsum()
    cdf_V /= cdf_V[-1]
    return cdf_V


def mask_tokens(
    original_ids: np.ndarray,
    random: np.random.RandomState,
    *,
    mask_id: int,
    vocab_size: int,
    num_special: int = 4,
    mask_prob: float = 0.15,
    leave_unmasked_prob: float = 0.1,
    random_token_prob: float = 0.1,
    mask_multiple_length: int = 1,
) -> MaskedTokens:
    """Mask about `mask_prob` of the positions.

    Of the chosen positions, `leave_unmasked_prob` keep their token, `random_token_prob` get a
    random one (any id except the first `num_special`; the mask symbol and sentinels included) and
    the rest get `mask_id`. Any position can be chosen, `<s>` and `</s>` included.
    """
    num_tokens = len(original_ids)
    num_starts = int(mask_prob * num_tokens / float(mask_multiple_length) + random.rand())
    starts = random.choice(num_tokens, num_starts, replace=False)
    chosen = (starts[:, None] + np.arange(mask_multiple_length)).ravel()
    is_masked = np.zeros(num_tokens, dtype=bool)
    is_masked[chosen[chosen < num_tokens]] = True

    masked_ids = np.array(original_ids, dtype=np.int64)
    is_kept = np.zeros(num_tokens, dtype=bool)
    is_random = np.zeros(num_tokens, dtype=bool)
    keep_or_random_prob = random_token_prob + leave_unmasked_prob
    if keep_or_random_prob > 0:
        is_special = is_masked & (random.rand(num_tokens) < keep_or_random_prob)
        if random_token_prob == 0:
            is_kept = is_special
        elif leave_unmasked_prob == 0:
            is_random = is_special
        else:
            keeps = random.rand(num_tokens) < leave_unmasked_prob / keep_or_random_prob
            is_kept, is_random = is_special & keeps, is_special & ~keeps
    masked_ids[is_masked & ~is_kept] = mask_id

    num_random = int(is_random.sum())
    if num_random > 0:
        # = random.choice(vocab_size, num_random, p=...), without its O(V) work for every item
        cdf_V = _random_token_cdf(vocab_size, num_special)
        masked_ids[is_random] = cdf_V.searchsorted(random.random_sample(num_random), side="right")
    return MaskedTokens(masked_ids, is_masked)


def corrupt_spans(
    original_ids: np.ndarray,
    random: np.random.RandomState,
    *,
    first_sentinel_id: int,
    max_positions: int,
    mask_prob: float = 0.15,
    empty_prob: float = 0.0,
    mask_multiple_length: int = 5,
    max_target_tokens: int | None = None,
) -> CorruptedSpans:
    """Replace spans of 1 to `mask_multiple_length` tokens by sentinels.

    `empty_prob` is the share of `mask_prob` spent on empty spans: sentinels that stand for nothing,
    placed at unmarked tokens without a marked neighbour. Kept from the original: spans wrap around
    the end of the sequence, and a target longer than `max_positions` - 1 is cut to `max_positions`
    before its closing sentinel, so it ends up one token too long. Where a model has no room for
    that token, `max_target_tokens` is the length that the closed target is cut to.
    """
    original_ids = np.asarray(original_ids, dtype=np.int64)
    num_tokens, length = len(original_ids), mask_multiple_length

    is_marked = np.zeros(num_tokens, dtype=bool)
    mean_length = (1 + length) / 2
    num_spans = int(mask_prob * (1 - empty_prob) * num_tokens / mean_length + random.rand())
    ends = random.choice(num_tokens, num_spans, replace=False)
    is_marked[ends] = True
    for i in range(length - 1):  # of the spans that still grow, 1/(length - i) stop here
        num_growing = int(len(ends) * (1 - 1 / (length - i)) + random.rand())
        ends = (random.choice(ends, num_growing, replace=False) + 1) % num_tokens
        is_marked[ends] = True

    left, right = np.zeros_like(is_marked), np.zeros_like(is_marked)
    left[1:], right[:-1] = is_marked[:-1], is_marked[1:]
    is_start = is_marked & ~left
    if empty_prob > 0:
        num_empty = max(0, int(mask_prob * num_tokens - is_marked.sum() + random.rand()))
        num_empty = min(num_empty, int(mask_prob * empty_prob * num_tokens + 1))
        candidates = np.flatnonzero(~(is_marked | left | right))
        num_empty = min(num_empty, len(candidates))
        if len(candidates) > 0:
            is_start[random.choice(candidates, num_empty, replace=False)] = True

    # A sentinel goes in front of the token at its start, on both sides.
    starts = np.flatnonzero(is_start)
    sentinels = first_sentinel_id + 1 + np.arange(len(starts))
    input_ids = _insert_before(original_ids, starts, sentinels, ~is_marked)
    target_ids = _insert_before(original_ids, starts, sentinels, is_marked)
    if len(target_ids) > max_positions - 1:
        target_ids = target_ids[:max_positions]
    if max_target_tokens is not None:
        target_ids = target_ids[: max_target_tokens - 1]
    target_ids = np.append(target_ids, first_sentinel_id)
    return CorruptedSpans(input_ids[:max_positions], target_ids)


def _insert_before(
    ids: np.ndarray, starts: np.ndarray, sentinels: np.ndarray, is_kept: np.ndarray
) -> np.ndarray:
    """Return the kept ids, with `sentinels[i]` in front of position `starts[i]`."""
    with_sentinels = np.insert(ids, starts, sentinels)
    keep = np.insert(is_kept, starts, True)
    return with_sentinels[keep]
