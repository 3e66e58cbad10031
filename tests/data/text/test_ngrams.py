"""Bits of n-gram models: equal to a plain computation, proper distributions, stated samples."""

from collections import Counter
from math import log2

import numpy as np
import pytest

from metro.data.text import ngrams
from metro.data.text.ngrams import NAMES, reference_bits, without_separators
from tests.data.prepared import prepare, random_text

V = 9


def probability(train: list[int], word: int, context: tuple[int, ...]) -> float:
    """The formula at the top of the module, with dictionaries."""
    lower = probability(train, word, context[1:]) if context else 1 / V
    order = len(context) + 1
    counts = Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))
    once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
    discount = once / (once + 2 * twice) if once else 0.75
    following = {ngram: count for ngram, count in counts.items() if ngram[:-1] == context}
    if not following:
        return lower
    share = max(counts[(*context, word)] - discount, 0) + discount * len(following) * lower
    return share / sum(following.values())


def texts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed random ids; the last two occur in the validation text alone."""
    random = np.random.default_rng(seed)
    train = np.minimum(random.geometric(0.35, 80) + 2, V - 3).astype(np.uint16)
    return train, np.minimum(random.geometric(0.3, 40) + 2, V - 1).astype(np.uint16)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bits_are_those_of_the_formula(seed):
    train, valid = texts(seed)
    expected = {name: [] for name in NAMES}
    for place, word in enumerate(valid.tolist()):
        for order, name in enumerate(NAMES, 1):
            context = tuple(valid[max(0, place - order + 1) : place].tolist())
            expected[name].append(-log2(probability(train.tolist(), word, context)))
    found = reference_bits(train, valid, V)
    for name, bits in expected.items():
        assert found[name] == pytest.approx(np.mean(bits), abs=1e-4), name
    assert (found["train_tokens"], found["valid_tokens"]) == (80, 40)


@pytest.mark.parametrize("context", [[3, 3], [3, 4], [4, 8], [8, 8]])
def test_probabilities_of_all_tokens_sum_to_one(context):
    """Of seen and unseen contexts; the validation text ends with each token in turn."""
    train, _ = texts(0)
    total = np.zeros(3)
    for word in range(V):
        valid = np.array([*context, word])
        found = np.full(3, 1 / V)
        for order in (1, 2, 3):
            found = ngrams.refine(found, train, valid, V, order)
            total[order - 1] += found[-1]
    assert total == pytest.approx(1)


def test_a_text_that_its_neighbour_decides_costs_a_bigram_nothing():
    """Oracle: two tokens in turn carry one bit without context, none with it."""
    turns = np.tile([4, 5], 500)
    found = reference_bits(turns, turns, V)
    assert found["unigram"] == pytest.approx(1, abs=1e-2)
    assert found["bigram"] < 0.02 and found["trigram"] < 0.02


def test_large_texts_are_sampled_from_beginning_to_end(monkeypatch):
    monkeypatch.setattr(ngrams, "MOST_TRAIN_TOKENS", 640)
    train = np.repeat([4, 5, 6, 7], 1000)
    found = reference_bits(train, train[:10], V)
    assert found["train_tokens"] == 640
    assert np.unique(ngrams.evenly_spread(train, 640)).tolist() == [4, 5, 6, 7]


def test_separators_of_documents_do_not_count():
    ids = np.array([2, 5, 6, 2, 2, 7, 2, 8, 2, 2])
    assert without_separators(ids).tolist() == [5, 6, 2, 7, 2, 8, 2]


def test_prepare_text_keeps_the_bits_in_its_manifest(vocab, tmp_path):
    (tmp_path / "books.txt").write_text(random_text(1, 300))
    result, _ = prepare([tmp_path / "books.txt"], tmp_path / "data", vocab, valid_fraction=0.1)
    train, valid = (
        np.fromfile(tmp_path / f"data/{split}.bin", np.uint16) for split in ("train", "valid")
    )
    counts = result.manifest["counts"]
    expected = reference_bits(train, valid, counts["vocab_size"])
    assert result.manifest["reference_bits"] == expected
    assert 0 < expected["trigram"] < log2(counts["vocab_size"])
    without, _ = prepare([tmp_path / "books.txt"], tmp_path / "other", vocab)
    assert without.manifest["reference_bits"] is None
