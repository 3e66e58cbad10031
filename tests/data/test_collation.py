"""Crops, blocks and batches, by hand."""

import numpy as np
import pytest

from metro.data.collation import (
    MaskedExample,
    SpanExample,
    collate_masked,
    collate_spans,
    crop,
    join_block,
    pad_batch,
    shift_right,
)

PAD, START = 1, 90


def test_a_crop_is_the_start_or_a_random_run():
    ids = np.arange(10, 20)
    assert crop(ids, 10) is ids
    assert crop(ids, 4).tolist() == [10, 11, 12, 13]
    starts = {int(crop(ids, 8, np.random.RandomState(seed))[0]) for seed in range(20)}
    assert starts == {10, 11}  # the original never draws the last place, 12
    assert len(crop(ids, 8, np.random.RandomState(0))) == 8


def test_nothing_is_drawn_where_nothing_is_cut():
    random = np.random.RandomState(0)
    crop(np.arange(4), 4, random)
    assert random.randint(1 << 30) == np.random.RandomState(0).randint(1 << 30)


def test_a_block_joins_items_behind_its_first_symbol():
    items = [np.array([5, 6, 2], dtype=np.uint16), np.array([7, 2], dtype=np.uint16)]
    assert join_block(items, 0, 5, bos=0).tolist() == [0, 5, 6, 2, 7, 2]
    assert join_block(items, 1, 3, bos=0).tolist() == [0, 6, 2, 7]
    assert join_block(items, 1, 3, bos=0).dtype == np.int64


def test_shifted_right_by_one():
    assert shift_right(np.array([5, 6, 2]), START).tolist() == [START, 5, 6]


@pytest.mark.parametrize(
    ("lengths", "max_width", "width"),
    [
        ((3, 8), None, 8),
        ((9, 2), None, 16),
        ((9, 2), 64, 16),
        ((9, 2), 12, 12),  # between the longest and the multiple of 8
        ((9, 2), 9, 9),
        ((9, 2), 6, 9),  # never below the longest
    ],
)
def test_width_of_a_batch(lengths, max_width, width):
    batch = pad_batch([np.full(n, 7) for n in lengths], PAD, max_width)
    assert batch.shape == (2, width)
    assert batch.eq(7).sum(1).tolist() == list(lengths)
    assert batch[1, lengths[1] :].eq(PAD).all()


def masked_example(index, ids, masked):
    ids, is_masked = np.array(ids), np.isin(np.arange(len(ids)), masked)
    return MaskedExample(index, ids, np.where(is_masked, START, ids), is_masked, 1000 + index)


def test_a_batch_of_masked_examples():
    examples = [masked_example(4, [0, 5, 6, 2], [1, 2]), masked_example(7, [0, 8, 2], [0])]
    batch = collate_masked(examples, PAD, START, max_width=5)
    assert batch.indices.tolist() == [4, 7] and batch.lengths.tolist() == [4, 3]
    assert batch.original_ids.tolist() == [[0, 5, 6, 2, 1], [0, 8, 2, 1, 1]]
    assert batch.masked_ids.tolist() == [[0, 90, 90, 2, 1], [90, 8, 2, 1, 1]]
    assert batch.decoder_input_ids.tolist() == [[90, 0, 5, 6, 1], [90, 0, 8, 1, 1]]
    assert batch.is_masked.int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.sampling_seed.tolist() == [1004, 1007]
    assert batch.max_masked == 2 and batch.num_tokens == 7


def test_a_batch_of_span_examples():
    one = SpanExample(3, np.array([0, 91, 2]), np.array([91, 5, 6, 90]), 4)
    other = SpanExample(5, np.array([0, 9, 8, 91]), np.array([91, 90]), 3)
    batch = collate_spans([one, other], PAD, START, max_width=4)
    assert batch.indices.tolist() == [3, 5] and batch.lengths.tolist() == [3, 4]
    assert batch.input_ids.tolist() == [[0, 91, 2, 1], [0, 9, 8, 91]]
    assert batch.target_ids.tolist() == [[91, 5, 6, 90], [91, 90, 1, 1]]
    assert batch.decoder_input_ids.tolist() == [[90, 91, 5, 6], [90, 91, 1, 1]]
    assert batch.num_target_tokens == 6 and batch.num_text_tokens == 7


@pytest.mark.parametrize(
    ("lengths", "has_padding"), [((8, 8), False), ((8, 7), True), ((6, 6), True)]
)
def test_padding_is_reported_where_any_row_has_some(lengths, has_padding):
    masked = [masked_example(i, [5] * n, [0]) for i, n in enumerate(lengths)]
    assert collate_masked(masked, PAD, START).has_padding is has_padding
    # of the input: the decoder looks only back, so padding of the target hides nothing
    spans = [SpanExample(i, np.full(n, 5), np.array([91, 90]), n) for i, n in enumerate(lengths)]
    assert collate_spans(spans, PAD, START).has_padding is has_padding
