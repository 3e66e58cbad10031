"""Reference lines of pretraining: bits per held-out token of uni-, bi- and trigram models.

A loss means little by itself; a model that uses context is below the bigram's bits. The models
interpolate by absolute discounting (Ney, Essen and Kneser, 1994): with counts c in the training
text, words w behind the context h, and h' the context without its first token,

    P(w | h) = (max(c(h, w) - D, 0) + D * N(h) * P(w | h')) / c(h)

N(h) is the number of distinct tokens seen behind h, D = n1 / (n1 + 2 n2) for n1 n-grams seen once
and n2 seen twice (0.75 where none is seen once, so that no token is impossible), and the unigram
backs off to 1 / V. An unseen context gives P(w | h').
"""

import numpy as np

from metro.modeling.text_metro_t5 import EOS_ID

NAMES = ("unigram", "bigram", "trigram")
MOST_TRAIN_TOKENS, MOST_VALID_TOKENS = 10_000_000, 1_000_000
"""Larger texts are sampled: the counts stay below half a gigabyte and take seconds."""
_NUM_PIECES = 64


def reference_bits(train_ids: np.ndarray, valid_ids: np.ndarray, vocab_size: int) -> dict:
    """Count n-grams in the training ids, and measure the validation ids with them.

    Args:
        train_ids, valid_ids: ids of all items joined, as in ``train.bin``; separators of documents
            (an item of ``</s>`` alone) do not count.
        vocab_size: V.

    Returns:
        Mean bits per validation token of each of `NAMES`, and the ``train_tokens`` and
        ``valid_tokens`` that were counted: evenly spread pieces of a text with more than
        `MOST_TRAIN_TOKENS` and `MOST_VALID_TOKENS`.
    """
    train = without_separators(evenly_spread(train_ids, MOST_TRAIN_TOKENS))
    valid = without_separators(evenly_spread(valid_ids, MOST_VALID_TOKENS))
    found: dict = {}
    probability = np.full(len(valid), 1 / vocab_size)
    for order, name in enumerate(NAMES, 1):
        if min(len(train), len(valid)) >= order:
            probability = refine(probability, train, valid, vocab_size, order)
        found[name] = round(float(-np.log2(probability).mean()), 4) if len(valid) else None
    return {**found, "train_tokens": len(train), "valid_tokens": len(valid)}


def refine(
    lower: np.ndarray, train: np.ndarray, valid: np.ndarray, vocab_size: int, order: int
) -> np.ndarray:
    """Return the probabilities under the n-gram model of an order, given those of the one below."""
    ngrams, counts = np.unique(numbered(train, vocab_size, order), return_counts=True)
    once, twice = (int((counts == times).sum()) for times in (1, 2))
    discount = once / (once + 2 * twice) if once else 0.75
    contexts, starts = np.unique(ngrams // vocab_size, return_index=True)
    totals = np.add.reduceat(counts, starts)
    num_following = np.diff(starts, append=len(ngrams))

    asked = numbered(valid, vocab_size, order)
    row, seen = find(asked, ngrams)
    count = np.where(seen, counts[row], 0)
    row, known = find(asked // vocab_size, contexts)
    refined, lower = lower.copy(), lower[order - 1 :]
    mixed = np.maximum(count - discount, 0) + discount * num_following[row] * lower
    refined[order - 1 :] = np.where(known, mixed / totals[row], lower)
    return refined


def numbered(ids: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    """Number the n-grams of a text in turn, the last token as the lowest digit."""
    assert vocab_size**order < 2**63
    numbers = np.zeros(len(ids) - order + 1, dtype=np.int64)
    for first in range(order):
        numbers = numbers * vocab_size + ids[first : first + len(numbers)]
    return numbers


def find(values: np.ndarray, sorted_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each value is, and whether it is there at all."""
    row = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return row, sorted_values[row] == values


def evenly_spread(ids: np.ndarray, most: int) -> np.ndarray:
    """Return at most that many ids: all, or pieces from the beginning to the end."""
    if len(ids) <= most:
        return np.asarray(ids)
    size = most // _NUM_PIECES
    starts = np.linspace(0, len(ids) - size, _NUM_PIECES).astype(np.int64)
    return np.concatenate([ids[start : start + size] for start in starts])


def without_separators(ids: np.ndarray) -> np.ndarray:
    """Leave out ``</s>`` at the beginning and behind another one."""
    is_end = ids == EOS_ID
    return ids[~(is_end & np.append(True, is_end[:-1]))]
