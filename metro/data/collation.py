"""From stored items to examples, and from examples to padded batches.

Pure NumPy until a batch is complete, so it runs in data loader processes; padding is on the right.

Shapes: B examples of a batch, T tokens of the longest one (rounded up), N tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

PAD_MULTIPLE = 8  # batches are padded to a multiple of this, as published


class MaskedExample(NamedTuple):
    """One example of METRO pretraining."""

    number: int
    """Its number in the dataset."""
    original_ids: np.ndarray
    """int64 [N]."""
    masked_ids: np.ndarray
    """int64 [N]: with masked positions."""
    is_masked: np.ndarray
    """bool [N]."""
    sampling_seed: int
    """Seeds the auxiliary model's samples."""


class MaskedBatch(NamedTuple):
    """A batch of METRO pretraining."""

    indices: torch.Tensor
    """int64 [B]: numbers in the dataset."""
    lengths: torch.Tensor
    """int64 [B]: tokens without padding."""
    original_ids: torch.Tensor
    """int64 [B, T]."""
    masked_ids: torch.Tensor
    """int64 [B, T]."""
    is_masked: torch.Tensor
    """bool [B, T]."""
    decoder_input_ids: torch.Tensor
    """int64 [B, T]: the original shifted right."""
    sampling_seed: torch.Tensor
    """int64 [B]."""
    max_masked: int
    """Masked positions of the sequence that has most; known here without asking a device."""
    has_padding: bool
    """True if any sequence is shorter than T; likewise."""
    num_tokens: int
    """Tokens without padding."""


class SpanExample(NamedTuple):
    """One example of span corruption."""

    number: int
    """Its number in the dataset."""
    input_ids: np.ndarray
    """int64: the text with sentinels for spans."""
    target_ids: np.ndarray
    """int64: the sentinels with their spans."""
    num_text_tokens: int
    """Tokens of the text before it was corrupted."""


class SpanBatch(NamedTuple):
    """A batch of span corruption; inputs and targets have widths of their own."""

    indices: torch.Tensor
    """int64 [B]: numbers in the dataset."""
    lengths: torch.Tensor
    """int64 [B]: input tokens without padding."""
    input_ids: torch.Tensor
    """int64 [B, T]."""
    target_ids: torch.Tensor
    """int64 [B, T of targets]."""
    decoder_input_ids: torch.Tensor
    """int64 [B, T of targets]: the target shifted right."""
    num_target_tokens: int
    """Target tokens without padding."""
    num_text_tokens: int
    """Tokens of the text before it was corrupted."""
    has_padding: bool
    """True if any input is shorter than T."""


def crop(
    ids: np.ndarray, max_tokens: int, random: np.random.RandomState | None = None
) -> np.ndarray:
    """Cut to the first `max_tokens` ids; with `random`, to as many from a random position.

    Draws only where something is cut. As in the original, the last possible position is never
    drawn.
    """
    excess = len(ids) - max_tokens
    if excess <= 0:
        return ids
    start = 0 if random is None else random.randint(0, excess)
    return ids[start : start + max_tokens]


def join_block(items: Sequence[np.ndarray], offset: int, num_tokens: int, bos: int) -> np.ndarray:
    """Return `bos` and `num_tokens` tokens of the joined items, from `offset` on."""
    joined = np.concatenate(items)[offset : offset + num_tokens]
    return np.concatenate([[bos], joined])


def shift_right(ids: np.ndarray, start: int) -> np.ndarray:
    """Return the decoder's input for the target `ids`: `start`, then all but the last id."""
    return np.concatenate([[start], ids[:-1]])


def pad_batch(sequences: Sequence[np.ndarray], pad, max_width: int | None = None) -> torch.Tensor:
    """Pad to [B, T], T a multiple of 8, or `max_width` where that is less.

    `max_width` is the longest sequence that the model takes; nothing is cut, so an example longer
    than that makes the batch as wide as itself.
    """
    longest = max(len(ids) for ids in sequences)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    if max_width is not None:
        width = max(longest, min(width, max_width))
    batch = np.full((len(sequences), width), pad, dtype=sequences[0].dtype)
    for padded, ids in zip(batch, sequences, strict=True):
        padded[: len(ids)] = ids
    return torch.from_numpy(batch)


def collate_masked(
    examples: Sequence[MaskedExample], pad: int, start: int, max_width: int | None = None
) -> MaskedBatch:
    """Merge examples of METRO pretraining; `start` is the decoder's first input."""

    def padded(sequences, value=pad):
        return pad_batch(sequences, value, max_width)

    indices, originals, masked_ids, is_masked, seeds = zip(*examples, strict=True)
    lengths = [len(ids) for ids in originals]
    original_ids = padded(originals)
    return MaskedBatch(
        indices=torch.tensor(indices),
        lengths=torch.tensor(lengths),
        original_ids=original_ids,
        masked_ids=padded(masked_ids),
        is_masked=padded(is_masked, False),
        decoder_input_ids=padded([shift_right(ids, start) for ids in originals]),
        sampling_seed=torch.tensor(seeds),
        max_masked=max(int(mask.sum()) for mask in is_masked),
        has_padding=min(lengths) < original_ids.shape[1],
        num_tokens=sum(lengths),
    )


def collate_spans(
    examples: Sequence[SpanExample], pad: int, start: int, max_width: int | None = None
) -> SpanBatch:
    """Merge examples of span corruption; `start` is the decoder's first input."""
    indices, inputs, targets, num_text_tokens = zip(*examples, strict=True)
    lengths = [len(ids) for ids in inputs]
    input_ids = pad_batch(inputs, pad, max_width)
    starts = [shift_right(ids, start) for ids in targets]
    return SpanBatch(
        indices=torch.tensor(indices),
        lengths=torch.tensor(lengths),
        input_ids=input_ids,
        target_ids=pad_batch(targets, pad, max_width),
        decoder_input_ids=pad_batch(starts, pad, max_width),
        num_target_tokens=sum(len(ids) for ids in targets),
        num_text_tokens=sum(num_text_tokens),
        has_padding=min(lengths) < input_ids.shape[1],
    )
