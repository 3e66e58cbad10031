"""The pretraining dataset: stored items -> blocks -> corrupted examples.

The work on arrays is done by `metro.data.blocks`, `metro.pretraining.masking` and
`metro.data.collation`. Nothing is read before it is needed: items stay in their memory-mapped file,
a block is put together when its example is asked for, and only the index of blocks is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from metro.data.blocks import batch_by_size, build_blocks, order_by_length
from metro.data.collation import (
    MaskedBatch,
    MaskedExample,
    SpanBatch,
    SpanExample,
    collate_masked,
    collate_spans,
    crop,
    join_block,
)
from metro.modeling.text_metro_t5 import BOS_ID, NUM_SPECIAL_IDS, PAD_ID
from metro.pretraining.masking import corrupt_spans, item_random, mask_tokens, sampling_seed
from metro.pretraining.settings import SHORTEN_METHODS
from metro.utils.messages import UserError

Batch = MaskedBatch | SpanBatch
Corruption = Callable[[np.ndarray, np.random.RandomState, int, int], NamedTuple]
"""(uncorrupted ids of a block, random, index, epoch) -> one example; pickled for loaders."""
Merge = Callable[[Sequence], Batch]


class Items(Protocol):
    """Stored sequences of ids."""

    @property
    def sizes(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def mask_block(original_ids, random, index: int, epoch: int, seed: int, **options) -> MaskedExample:
    """Mask a block for the auxiliary model; options as of `mask_tokens`."""
    masked_ids, is_masked = mask_tokens(original_ids, random, **options)
    sampled_by = sampling_seed(seed, epoch, index)
    return MaskedExample(index, original_ids, masked_ids, is_masked, sampled_by)


def corrupt_block(original_ids, random, index: int, epoch: int, **options) -> SpanExample:
    """Replace spans of a block by sentinels; options as of `corrupt_spans`."""
    corrupted = corrupt_spans(original_ids, random, **options)
    return SpanExample(index, *corrupted, num_text_tokens=len(original_ids))


def masking(options: Any, first_sentinel: int) -> Corruption:
    """Make the corruption of METRO; `options` has those of the task by their names."""
    return partial(
        mask_block,
        seed=options.seed,
        mask_id=first_sentinel,
        vocab_size=first_sentinel + options.tokens_per_sample,
        num_special=NUM_SPECIAL_IDS,
        mask_prob=options.mask_prob,
        leave_unmasked_prob=options.leave_unmasked_prob,
        random_token_prob=options.random_token_prob,
        mask_multiple_length=options.mask_multiple_length,
    )


def span_corruption(options: Any, first_sentinel: int, max_width: int | None) -> Corruption:
    """Make the corruption of T5; `max_width` is the longest sequence that the model takes."""
    return partial(
        corrupt_block,
        first_sentinel_id=first_sentinel,
        max_positions=options.tokens_per_sample,
        mask_prob=options.mask_prob,
        empty_prob=options.empty_prob,
        mask_multiple_length=options.mask_multiple_length,
        max_target_tokens=max_width,
    )


class PretrainingDataset:
    """Blocks of text, each starting with `<s>`, corrupted anew in every epoch.

    `epoch` decides the corruption; examples come by their numbers.

    Args:
        items: the stored sequences.
        options: those of the task by their names, and ``seed``.
        split: ``train`` or ``valid``; whether its items are cropped is an option. The crop is drawn
            once and is the same in every epoch, as in the original.
        is_metro: METRO's task, not T5's.
        first_sentinel: size of the vocabulary without sentinels.
        max_width: longest sequence that the model takes.
        name: for messages.

    Raises:
        UserError: there is not one block.
    """

    def __init__(
        self,
        items: Items,
        options: Any,
        split: str,
        *,
        is_metro: bool,
        first_sentinel: int,
        max_width: int | None,
        name: str = "the dataset",
    ):
        super().__init__()
        self.items, self.seed = items, options.seed
        self.first_sentinel, self.name = first_sentinel, name
        if is_metro:
            self.corruption = masking(options, first_sentinel)
        else:
            self.corruption = span_corruption(options, first_sentinel, max_width)
        collate: Callable = collate_masked if is_metro else collate_spans
        self.merge: Merge = partial(collate, pad=PAD_ID, start=first_sentinel, max_width=max_width)
        splits = options.shorten_data_split_list
        shortens = not splits or split in splits.split(",")
        self.crop = str(options.shorten_method) if shortens else "none"
        if self.crop not in SHORTEN_METHODS:
            known = ", ".join(SHORTEN_METHODS)
            raise UserError(f"shorten_method is {self.crop!r}; use one of {known}")
        self.max_block = options.tokens_per_sample - 1  # leaves room for <s>
        self.epoch = 1
        break_mode = str(options.sample_break_mode)
        self.blocks = build_blocks(
            items.sizes, break_mode, self.max_block, crop_items=self.crop != "none"
        )
        if len(self) == 0:
            raise UserError(
                f"{name} holds {len(items)} items but not one block of text (sample_break_mode "
                f"{break_mode}); leave this shard out of task.data or binarise its text again"
            )
        self.sizes = self.blocks.num_tokens + 1

    def __len__(self) -> int:
        return len(self.blocks.num_tokens)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _item(self, index: int) -> np.ndarray:
        ids = np.asarray(self.items[index])
        if self.crop == "none" or len(ids) <= self.max_block:
            return ids
        draws = self.crop == "random_crop"
        return crop(ids, self.max_block, item_random(self.seed, 0, index) if draws else None)

    def block_ids(self, index: int) -> np.ndarray:
        """Return the uncorrupted ids of one example, `<s>` first."""
        first, last, offset, length = (int(field[index]) for field in self.blocks)
        items = [self._item(i) for i in range(first, last + 1)]
        ids = join_block(items, offset, length, BOS_ID)
        if ids.max() >= self.first_sentinel:
            raise UserError(
                f"{self.name} holds id {ids.max()} (items {first} to {last}), but dict.txt ends at "
                f"id {self.first_sentinel - 1}; use the dict.txt that the data was binarised with"
            )
        return ids

    def __getitem__(self, index: int) -> NamedTuple:
        index = int(index)
        random = item_random(self.seed, self.epoch, index)
        return self.corruption(self.block_ids(index), random, index, self.epoch)

    def ordered_indices(self) -> np.ndarray:
        """Order by length; equal lengths in one random order that is the same in every epoch."""
        return order_by_length(self.sizes, self.seed)

    def batch_by_size(
        self, indices, max_tokens=None, max_sentences=None, required_batch_size_multiple=1
    ) -> list[np.ndarray]:
        indices = np.asarray(indices)
        return batch_by_size(
            indices, self.sizes[indices], max_tokens, max_sentences, required_batch_size_multiple
        )
