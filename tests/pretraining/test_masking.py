"""Masking and span corruption against what the original made of 20 sequences."""

import json

import numpy as np
import pytest

from metro.pretraining.masking import (
    _random_token_cdf,
    corrupt_spans,
    item_random,
    item_seed,
    mask_tokens,
    sampling_seed,
)


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "masking.json").read_text())


@pytest.fixture(scope="module")
def sequences(recorded):
    return {entry["index"]: np.array(entry["tokens"]) for entry in recorded["inputs"]}


def test_item_seeds_equal_those_of_the_original(recorded):
    for entry in recorded["item_seeds"]:
        seeds = [item_seed(entry["seed"], entry["epoch"], i) for i in range(20)]
        assert seeds == entry["numpy_seed_per_index"]


def test_masked_tokens_equal_those_of_the_original(recorded, sequences):
    meta = recorded["meta"]
    for entry in recorded["masked_tokens"]:
        for item in entry["items"]:
            original = sequences[item["index"]]
            masked = mask_tokens(
                original,
                item_random(entry["seed"], entry["epoch"], item["index"]),
                mask_id=meta["sentinel_idx_begin"],
                vocab_size=meta["vocab_size"],
                num_special=meta["nspecial"],
                mask_prob=entry["mask_prob"],
                leave_unmasked_prob=entry["leave_unmasked_prob"],
                random_token_prob=entry["random_token_prob"],
                mask_multiple_length=entry["mask_multiple_length"],
            )
            assert masked.masked_ids.tolist() == item["src"]
            assert np.where(masked.is_masked, original, meta["pad"]).tolist() == item["target"]


def test_corrupted_spans_equal_those_of_the_original(recorded, sequences):
    meta = recorded["meta"]
    for entry in recorded["t5_span"]:
        for item in entry["items"]:
            spans = corrupt_spans(
                sequences[item["index"]],
                item_random(entry["seed"], entry["epoch"], item["index"]),
                first_sentinel_id=meta["sentinel_idx_begin"],
                max_positions=entry["max_positions"],
                mask_prob=entry["mask_prob"],
                empty_prob=entry["empty_prob"],
                mask_multiple_length=entry["mask_multiple_length"],
            )
            assert spans.input_ids.tolist() == item["src"]
            assert spans.target_ids.tolist() == item["target"]


@pytest.mark.parametrize(("limit", "length"), [(None, 21), (21, 21), (20, 20), (64, 21)])
def test_a_target_fits_the_room_that_the_model_has(limit, length):
    """Every token masked alone: 21 tokens of target without a limit, the last one closes it."""
    spans = corrupt_spans(
        np.arange(4, 24),
        item_random(1, 1, 0),
        first_sentinel_id=100,
        max_positions=20,
        mask_prob=0.99,
        mask_multiple_length=1,
        max_target_tokens=limit,
    )
    assert len(spans.target_ids) == length and spans.target_ids[-1] == 100
    assert len(spans.input_ids) <= 20


def test_random_tokens_are_drawn_as_numpys_choice_draws_them():
    """The cached distribution replaces RandomState.choice(V, n, p=p) and must give its numbers."""
    weights = np.ones(33280)
    weights[:4] = 0
    expected = np.random.RandomState(7).choice(33280, 50, p=weights / weights.sum())
    uniforms = np.random.RandomState(7).random_sample(50)
    assert _random_token_cdf(33280, 4).searchsorted(uniforms, side="right").tolist() == (
        expected.tolist()
    )


def test_the_global_random_generator_is_neither_read_nor_changed():
    ids = np.arange(4, 100)
    results = []
    for seed in (0, 1):
        np.random.seed(seed)
        before = np.random.get_state()[1].tolist()
        results.append(mask_tokens(ids, item_random(1, 1, 5), mask_id=100, vocab_size=101))
        corrupt_spans(ids, item_random(1, 1, 5), first_sentinel_id=100, max_positions=128)
        assert np.random.get_state()[1].tolist() == before
    assert results[0].masked_ids.tolist() == results[1].masked_ids.tolist()


@pytest.mark.parametrize(
    ("leave", "random", "kept", "masked"), [(0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 1.0, 0.0)]
)
def test_extreme_shares_mask_everything_or_nothing(leave, random, kept, masked):
    ids = np.arange(4, 104)
    result = mask_tokens(
        ids,
        item_random(1, 1, 0),
        mask_id=104,
        vocab_size=105,
        leave_unmasked_prob=leave,
        random_token_prob=random,
    )
    chosen = result.masked_ids[result.is_masked]
    assert 14 <= len(chosen) <= 16
    assert np.mean(chosen == ids[result.is_masked]) == kept
    assert np.mean(chosen == 104) == masked


def test_sampling_seeds_are_63_bit_and_distinct():
    seeds = {sampling_seed(1, epoch, index) for epoch in range(3) for index in range(500)}
    assert len(seeds) == 1500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60
    assert sampling_seed(1, 2, 3) == sampling_seed(np.int64(1), np.int64(2), np.int64(3))
