"""Cutting a tokenised corpus into blocks, and blocks into batches.

`build_blocks` and `batch_by_size` give exactly what fairseq's compiled helpers give
(`TokenBlockDataset`, `batch_by_size`), in NumPy, so that a pure Python installation of fairseq is
enough. Work is done in arrays where possible: the remaining Python loops run over blocks and
over distinct lengths, never over the items of a corpus one by one.

Terms: an *item* is one stored sequence (a paragraph with its `</s>`); a *block* is what one
training example is made of, a run of neighbouring items or, with break mode `none`, of tokens.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from metro.utils.messages import UserError

BREAK_MODES = ("none", "complete", "complete_doc", "eos")
_CHUNK_ITEMS = 1 << 21  # bounds the temporary memory of build_blocks


class Blocks(NamedTuple):
    """The blocks: `num_tokens` tokens of their joined items, from `first_offset` on."""

    first_item: np.ndarray
    """[blocks] first item that belongs to the block."""
    last_item: np.ndarray
    """[blocks] last item that belongs to the block (inclusive)."""
    first_offset: np.ndarray
    """[blocks] tokens to skip in the first item; 0 except with break mode `none`."""
    num_tokens: np.ndarray
    """[blocks] length of the block."""


def build_blocks(
    sizes: np.ndarray,
    break_mode: str,
    block_size: int,
    crop_items: bool = False,
) -> Blocks:
    """Group items of the given `sizes` into blocks of up to `block_size` tokens.

    none: every block has `block_size` tokens, items are cut. complete: blocks of whole items.
    complete_doc: whole items of one document; an item of one token ends a document and belongs to
    no block. eos: one item per block. An item longer than `block_size` is a block of
    its own (it is not cut, except with none), or counts as `block_size` tokens with `crop_items`.
    """
    sizes = np.asarray(sizes)
    if crop_items:
        sizes = np.minimum(sizes, block_size)
    if break_mode not in BREAK_MODES:
        raise UserError(f"sample_break_mode is {break_mode!r}; use one of {', '.join(BREAK_MODES)}")
    if break_mode != "eos" and block_size < 1:
        raise UserError(f"blocks of {block_size} tokens cannot be built; raise tokens_per_sample")
    if len(sizes) == 0:
        none = np.zeros(0, dtype=np.int32)
        return Blocks(none, none, none, none)
    if sizes.min() < 1:
        item = int(sizes.argmin())
        raise UserError(
            f"item {item} of the corpus has {sizes[item]} tokens; every item needs at least its "
            "end-of-sentence token: binarise the text again"
        )

    if break_mode == "eos":
        items: np.ndarray = np.arange(len(sizes), dtype=_index_dtype(len(sizes)))
        return Blocks(items, items, np.zeros_like(items), sizes.astype(np.int32))

    ends = np.cumsum(sizes, dtype=np.int64)  # tokens up to and including each item
    if break_mode == "none":
        first_token = np.arange(0, int(ends[-1]), block_size, dtype=np.int64)
        last_token = np.minimum(first_token + block_size, ends[-1]) - 1
        first_item = np.searchsorted(ends, first_token, side="right")
        last_item = np.searchsorted(ends, last_token, side="right")
        first_offset = first_token - (ends[first_item] - sizes[first_item])
        num_tokens = last_token + 1 - first_token
        return _compact(first_item, last_item, first_offset, num_tokens, len(sizes))

    is_separator = sizes == 1 if break_mode == "complete_doc" else None
    starts, stops = _follow_whole_items(sizes, ends, is_separator, block_size)
    num_tokens = ends[stops - 1] - ends[starts] + sizes[starts]
    if break_mode == "complete_doc":  # as the original: a document of one token is dropped
        keep = num_tokens > 1
        starts, stops, num_tokens = starts[keep], stops[keep], num_tokens[keep]
    return _compact(starts, stops - 1, np.zeros_like(starts), num_tokens, len(sizes))


def _follow_whole_items(
    sizes: np.ndarray, ends: np.ndarray, is_separator: np.ndarray | None, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find first item and item after the last one of every block that holds whole items.

    Where a block stops depends only on the item that it starts with. So that is computed for all
    items at once (a binary search in the running totals), and a loop hops from block to block.
    """
    num_items = len(sizes)
    starts, stops = array("q"), array("q")
    if is_separator is not None:
        separators = np.flatnonzero(is_separator)
        separators = np.append(separators, num_items)
    position = 0
    while position < num_items:
        chunk = slice(position, min(position + _CHUNK_ITEMS, num_items))
        items = np.arange(chunk.start, chunk.stop)
        limit = ends[chunk] - sizes[chunk] + block_size
        stop = np.searchsorted(ends, limit, side="right")
        stop = np.maximum(stop, items + 1)
        if is_separator is not None:
            document_end = separators[np.searchsorted(separators, items, side="left")]
            stop = np.minimum(stop, document_end)  # = the item itself where it is a separator
        next_item = stop.tolist()
        first, size = chunk.start, len(next_item)
        local = 0
        while local < size:
            following = next_item[local]
            if following == first + local:
                local += 1  # a separator
                continue
            starts.append(first + local)
            stops.append(following)
            local = following - first
        position = first + local
    return np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)


def _compact(
    first_item: np.ndarray,
    last_item: np.ndarray,
    first_offset: np.ndarray,
    num_tokens: np.ndarray,
    num_items: int,
) -> Blocks:
    index = _index_dtype(num_items)
    return Blocks(
        first_item.astype(index),
        last_item.astype(index),
        first_offset.astype(np.int32),
        num_tokens.astype(np.int32),
    )


def _index_dtype(num_items: int) -> type:
    return np.int32 if num_items < 2**31 else np.int64


def order_by_length(sizes: np.ndarray, seed: int) -> np.ndarray:
    """Sort example numbers by length; equal lengths in a random order that `seed` decides."""
    ties = np.random.RandomState(seed).permutation(len(sizes))
    return np.lexsort([ties, sizes])


def batch_by_size(
    indices: np.ndarray,
    sizes: np.ndarray,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
) -> list[np.ndarray]:
    """Cut `indices` (in this order) into batches.

    `sizes[i]` is the length of example `indices[i]`. A batch takes examples while their number is
    at most `max_sentences` and number times longest is at most `max_tokens`; then, if it holds at
    least `required_batch_size_multiple` of them, it gives the odd ones back to the next batch.
    Nothing is dropped: the last batches may hold fewer.
    """
    indices, sizes = np.asarray(indices), np.asarray(sizes)
    if len(indices) == 0:
        return []
    max_tokens = int(max_tokens) if max_tokens is not None and max_tokens > 0 else None
    max_sentences = int(max_sentences) if max_sentences is not None and max_sentences > 0 else None
    longest = int(sizes.max())
    if max_tokens is not None and longest > max_tokens:
        raise UserError(
            f"example {indices[int(sizes.argmax())]} has {longest} tokens, more than max_tokens "
            f"{max_tokens}; raise dataset.max_tokens or lower tokens_per_sample"
        )
    multiple = max(1, required_batch_size_multiple)
    if bool((np.diff(sizes) >= 0).all()):
        ends = _batch_ends_sorted(sizes, max_tokens, max_sentences, multiple)
    else:
        ends = _batch_ends_any_order(sizes, max_tokens, max_sentences, multiple)
    bounds = [0, *ends]
    return [indices[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _trim(count: int, multiple: int) -> int:
    return count if count < multiple else count - count % multiple


def _batch_ends_sorted(
    sizes: np.ndarray, max_tokens: int | None, max_sentences: int | None, multiple: int
) -> list[int]:
    """Find batch ends for ascending sizes: one step for all batches that hold a single length."""
    num_examples = len(sizes)
    lengths, run_starts = np.unique(sizes, return_index=True)
    lengths = lengths.tolist()
    run_ends = [*run_starts[1:].tolist(), num_examples]
    cap = max_sentences or num_examples

    ends: list[int] = []
    start, run = 0, 0  # the run that holds the first example of the batch
    while start < num_examples:
        while run_ends[run] <= start:
            run += 1
        # Whole batches inside this run.
        count = cap if max_tokens is None else min(cap, max_tokens // lengths[run])
        take = _trim(count, multiple)
        inside = (run_ends[run] - start) // take if run_ends[run] - start > count else 0
        # the last one must be followed by enough of the same length to be full before trimming
        while inside and start + (inside - 1) * take + count > run_ends[run]:
            inside -= 1
        if inside:
            ends.extend(range(start + take, start + inside * take + 1, take))
            start += inside * take
            continue
        # A batch that reaches into longer runs: it grows run by run.
        count, reached = 0, run
        while reached < len(lengths):
            allowed = cap if max_tokens is None else min(cap, max_tokens // lengths[reached])
            if allowed <= run_ends[reached] - start:
                count = max(count, allowed)
                break
            count = run_ends[reached] - start
            reached += 1
        start += _trim(count, multiple)
        ends.append(start)
    return ends


def _batch_ends_any_order(
    sizes: np.ndarray, max_tokens: int | None, max_sentences: int | None, multiple: int
) -> list[int]:
    """Find batch ends for sizes in any order: one vectorised look ahead per batch."""
    num_examples = len(sizes)
    cap = max_sentences or num_examples
    ends: list[int] = []
    start = 0
    while start < num_examples:
        ahead = cap if max_tokens is None else min(cap, max_tokens // int(sizes[start]))
        window = np.maximum.accumulate(sizes[start : start + ahead])
        count = len(window)
        if max_tokens is not None:
            too_big = window.astype(np.int64) * np.arange(1, count + 1) > max_tokens
            if too_big.any():
                count = int(too_big.argmax())
        start += _trim(count, multiple)
        ends.append(start)
    return ends
