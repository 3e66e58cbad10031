"""The pretraining dataset as fairseq takes it: `metro.pretraining.dataset` with its names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from fairseq.data import FairseqDataset

from metro.pretraining.dataset import PretrainingDataset

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


class FairseqPretrainingDataset(PretrainingDataset, FairseqDataset):
    """Adds what fairseq asks of a dataset."""

    def collater(self, examples: list[NamedTuple]) -> dict:
        return as_sample(self.merge(examples)) if examples else {}

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    num_tokens = size

    def num_tokens_vec(self, indices) -> np.ndarray:
        return self.sizes[indices]
