"""Blocks and batches against a plain loop over items, and against the original's recorded ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metro.data import blocks as blocks_module
from metro.data.blocks import BREAK_MODES, batch_by_size, build_blocks, order_by_length

item_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def blocks_one_by_one(sizes, break_mode, block_size):
    """Oracle: (first token, end token) of each block, walking over the items as fairseq does."""
    spans, start, length = [], 0, 0

    def close():
        nonlocal start, length
        if length > (1 if break_mode == "complete_doc" else 0):
            spans.append((start, start + length))
        start, length = start + length, 0

    for size in sizes:
        separates = break_mode == "complete_doc" and size == 1
        if separates or (length > 0 and length + size > block_size):
            close()
        if separates:
            start += size
        else:
            length += size
    close()
    return spans


def batches_one_by_one(sizes, max_tokens, max_sentences, multiple):
    """Oracle: batch ends, adding example by example and giving back the odd ones."""
    ends, start = [], 0
    while start < len(sizes):
        count = 1
        while start + count < len(sizes):
            longest = max(sizes[start : start + count + 1])
            too_long = max_tokens is not None and longest * (count + 1) > max_tokens
            if too_long or (max_sentences is not None and count + 1 > max_sentences):
                break
            count += 1
        start += count if count < multiple else count // multiple * multiple
        ends.append(start)
    return ends


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("break_mode", ["complete", "complete_doc"])
@settings(max_examples=150, deadline=None)
@given(sizes=item_sizes, block_size=st.integers(1, 30))
def test_whole_item_blocks_equal_those_of_a_loop(break_mode, chunk, sizes, block_size):
    before, blocks_module._CHUNK_ITEMS = blocks_module._CHUNK_ITEMS, chunk
    try:
        blocks = build_blocks(np.array(sizes), break_mode, block_size)
    finally:
        blocks_module._CHUNK_ITEMS = before
    ends = np.cumsum(sizes)
    starts = ends - sizes
    found = [(starts[first], ends[last]) for first, last in zip(*blocks[:2], strict=True)]
    assert found == blocks_one_by_one(sizes, break_mode, block_size)
    assert blocks.num_tokens.tolist() == [end - start for start, end in found]
    assert not blocks.first_offset.any()


@settings(max_examples=150, deadline=None)
@given(sizes=item_sizes, block_size=st.integers(1, 30))
def test_break_mode_none_cuts_the_stream_into_equal_pieces(sizes, block_size):
    stream = [(item, token) for item, size in enumerate(sizes) for token in range(size)]
    expected = [stream[i : i + block_size] for i in range(0, len(stream), block_size)]
    blocks = build_blocks(np.array(sizes), "none", block_size)
    found = []
    for first, last, offset, length in zip(*blocks, strict=True):
        joined = [(i, t) for i in range(first, last + 1) for t in range(sizes[i])]
        found.append(joined[offset : offset + length])
    assert found == expected


def test_break_mode_eos_makes_every_item_a_block():
    blocks = build_blocks(np.array([3, 1, 700]), "eos", 10)
    assert blocks.first_item.tolist() == blocks.last_item.tolist() == [0, 1, 2]
    assert blocks.num_tokens.tolist() == [3, 1, 700]


def test_documents_by_hand():
    """Documents of 4+3 and 2 tokens, an item of 9 that exceeds the block size, an empty one."""
    blocks = build_blocks(np.array([1, 4, 3, 1, 2, 1, 1, 9, 2, 1]), "complete_doc", 6)
    assert blocks.first_item.tolist() == [1, 2, 4, 7, 8]
    assert blocks.num_tokens.tolist() == [4, 3, 2, 9, 2]


def test_cropped_items_count_as_one_block():
    """An item of 9 tokens crops to 6, and leaves no room for the next one."""
    sizes = np.array([9, 2, 4])
    for break_mode in ("complete", "complete_doc"):
        blocks = build_blocks(sizes, break_mode, 6, crop_items=True)
        assert blocks.first_item.tolist() == [0, 1] and blocks.num_tokens.tolist() == [6, 6]
    assert build_blocks(sizes, "eos", 6, crop_items=True).num_tokens.tolist() == [6, 2, 4]
    assert sizes.tolist() == [9, 2, 4]


@pytest.mark.parametrize("ascending", [True, False])
@settings(max_examples=300, deadline=None)
@given(
    sizes=item_sizes,
    token_factor=st.one_of(st.none(), st.floats(1, 20)),
    max_sentences=st.one_of(st.none(), st.integers(1, 20)),
    multiple=st.sampled_from([1, 2, 3, 8]),
)
def test_batches_equal_those_of_a_loop(ascending, sizes, token_factor, max_sentences, multiple):
    sizes = np.array(sorted(sizes) if ascending else sizes)
    max_tokens = None if token_factor is None else int(sizes.max() * token_factor)
    indices = np.arange(len(sizes))[::-1].copy()
    batches = batch_by_size(indices, sizes, max_tokens, max_sentences, multiple)
    assert np.concatenate(batches).tolist() == indices.tolist()
    ends = np.cumsum([len(batch) for batch in batches]).tolist()
    assert ends == batches_one_by_one(sizes.tolist(), max_tokens, max_sentences, multiple)


def test_examples_are_ordered_by_length_and_equal_ones_at_random():
    sizes = np.array([3, 9] * 20)
    orders = [order_by_length(sizes, seed).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sizes[order].tolist() == [3] * 20 + [9] * 20
        assert sorted(order) == list(range(40)) and order[:20] != sorted(order[:20])


def test_an_example_above_max_tokens_is_named():
    with pytest.raises(ValueError, match="example 7 has 30 tokens.*max_tokens 20"):
        batch_by_size(np.array([5, 7]), np.array([10, 30]), max_tokens=20)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="'sentence'; use one of none, complete"):
        build_blocks(np.array([3]), "sentence", 10)
    with pytest.raises(ValueError, match="blocks of 0 tokens"):
        build_blocks(np.array([3]), "complete", 0)
    with pytest.raises(ValueError, match="item 1 of the corpus has 0 tokens"):
        build_blocks(np.array([3, 0]), "complete", 10)


@pytest.mark.parametrize("break_mode", BREAK_MODES)
def test_nothing_gives_nothing(break_mode):
    assert len(build_blocks(np.zeros(0, dtype=int), break_mode, 10).num_tokens) == 0
    assert batch_by_size(np.zeros(0, dtype=int), np.zeros(0, dtype=int)) == []


def test_a_large_corpus_takes_no_loop_over_items():
    """A million paragraphs in well under a second of work (about 0.2 s; 10 s leaves room)."""
    import time

    random = np.random.default_rng(0)
    sizes = random.integers(2, 160, 1_000_000).astype(np.int32)
    sizes[random.random(len(sizes)) < 0.05] = 1
    start = time.process_time()
    blocks = build_blocks(sizes, "complete_doc", 511)
    order = np.argsort(blocks.num_tokens, kind="stable")
    batches = batch_by_size(order, blocks.num_tokens[order], 8192, None, 8)
    assert time.process_time() - start < 10
    assert sum(map(len, batches)) == len(blocks.num_tokens)
    assert blocks.num_tokens.sum() == sizes[sizes > 1].sum()
