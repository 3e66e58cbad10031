"""The pretraining dataset: stored items -> blocks -> corrupted examples -> padded batches.

The work on arrays is done by `metro.data.blocks`, `metro.pretraining.masking` and
`metro.data.collation`. Nothing is read before it is needed: items stay in their memory-mapped file,
a block is put together when its example is asked for, and only the index of blocks is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fairseq.data import FairseqDataset
from fairseq.data.indexed_dataset import data_file_path, index_file_path

from metro.data.blocks import batch_by_size, build_blocks, order_by_length
from metro.data.collation import crop, join_block
from metro.data.indexed_file import check_indexed_file
from metro.pretraining.masking import item_random
from metro.utils.messages import UserError

# Field of a batch of `metro.data.collation` -> name that fairseq forces on it, in a sample and in
# its `net_input`; other fields are inputs under their own names. `models.metro_t5` and
# `models.transformer_t5` translate the inputs back.
OF_SAMPLE = {
    "indices": "id",
    "num_tokens": "ntokens",
    "num_target_tokens": "ntokens",
    "num_text_tokens": "num_text_tokens",
    "target_ids": "target",
}
INPUTS = {
    "masked_ids": "src_tokens",
    "input_ids": "src_tokens",
    "lengths": "src_lengths",
    "decoder_input_ids": "prev_output_tokens",
}


def as_sample(batch: NamedTuple) -> dict:
    """Rename a batch's fields as fairseq wants them."""
    fields = batch._asdict()
    sample = {OF_SAMPLE[name]: fields.pop(name) for name in OF_SAMPLE if name in fields}
    inputs = {INPUTS.get(name, name): value for name, value in fields.items()}
    return {**sample, "nsentences": len(sample["id"]), "net_input": inputs}


Corruption = Callable[[np.ndarray, np.random.RandomState, int, int], NamedTuple]
"""(uncorrupted ids of a block, random, index, epoch) -> one example; pickled for loaders."""


def check_files(path: str) -> None:
    """Refuse a missing, half missing, empty, cut or damaged split."""
    if not os.path.exists(index_file_path(path)):
        is_train = os.path.basename(path).startswith("train")
        without = (
            "; to train without validation: dataset.disable_validation=true (--disable-validation)"
        )
        raise UserError(
            f"no data at {path}.idx; check task.data (a folder made by `metro prepare-text` or "
            "fairseq-preprocess) and the split names (dataset.train_subset, dataset.valid_subset)"
            + ("" if is_train else without)
        )
    if not os.path.exists(data_file_path(path)):
        raise UserError(
            f"{path}.idx is there but {path}.bin is missing; a split needs both: copy the .bin "
            "file as well, or binarise the text again"
        )
    if os.path.getsize(data_file_path(path)) == 0:
        raise UserError(
            f"{path}.bin is empty (0 bytes); leave this shard out of task.data or binarise its "
            "text again"
        )
    check_indexed_file(Path(path))


class PretrainingDataset(FairseqDataset):
    """Blocks of text, each starting with `<s>`, corrupted anew in every epoch.

    `merge` makes a batch of examples. `crop` shortens items before they are grouped: "none",
    "truncate" or "random_crop"; the crop is drawn once and is the same in every epoch, as in the
    original.
    """

    def __init__(
        self,
        items,
        *,
        corruption: Corruption,
        merge: Callable[[list], NamedTuple],
        break_mode: str,
        tokens_per_sample: int,
        crop: str,
        bos: int,
        vocab_size: int,
        seed: int,
        name: str = "the dataset",
    ):
        super().__init__()
        self.items, self.corruption, self.merge = items, corruption, merge
        self.crop, self.bos, self.seed = crop, bos, seed
        self.vocab_size, self.name = vocab_size, name
        self.max_block = tokens_per_sample - 1  # leaves room for <s>
        self.epoch = 1
        self.blocks = build_blocks(
            items.sizes, break_mode, self.max_block, crop_items=crop != "none"
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
        ids = self.items[index].numpy()
        if self.crop == "none" or len(ids) <= self.max_block:
            return ids
        draws = self.crop == "random_crop"
        return crop(ids, self.max_block, item_random(self.seed, 0, index) if draws else None)

    def block_ids(self, index: int) -> np.ndarray:
        """Return the uncorrupted ids of one example, `<s>` first."""
        first, last, offset, length = (int(field[index]) for field in self.blocks)
        items = [self._item(i) for i in range(first, last + 1)]
        ids = join_block(items, offset, length, self.bos)
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.name} holds id {ids.max()} (items {first} to {last}), but dict.txt ends at "
                f"id {self.vocab_size - 1}; use the dict.txt that the data was binarised with"
            )
        return ids

    def __getitem__(self, index: int) -> NamedTuple:
        index = int(index)
        random = item_random(self.seed, self.epoch, index)
        return self.corruption(self.block_ids(index), random, index, self.epoch)

    def collater(self, examples: list[NamedTuple]) -> dict:
        return as_sample(self.merge(examples)) if examples else {}

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    num_tokens = size

    def num_tokens_vec(self, indices) -> np.ndarray:
        return self.sizes[indices]

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
