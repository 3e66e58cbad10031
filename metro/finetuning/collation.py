"""From encoded prompts to padded batches; NumPy until a batch is complete.

Letters: B examples, S encoder tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from metro.data.collation import pad_batch, shift_right


class EncodedPrompt(NamedTuple):
    """One example as the model takes it."""

    index: int
    """Its number inside its task."""
    source_ids: np.ndarray
    """Encoder ids, special tokens included."""
    target_ids: np.ndarray
    """Decoder target, end token included."""
    wrong_ids: np.ndarray | None = None
    """Encoder ids with a wrong label (flipped), or target ids of a wrong label (direct+ul)."""
    num_skipped: int = 0
    """Examples without a usable wrong label that were passed over for this one."""


class PromptBatch(NamedTuple):
    """A batch, longest source first."""

    indices: torch.Tensor
    """int64 [B]."""
    lengths: torch.Tensor
    """int64 [B]: source tokens without padding."""
    source_ids: torch.Tensor
    """int64 [B, S]."""
    target_ids: torch.Tensor
    """int64 [B, T]."""
    decoder_input_ids: torch.Tensor | None
    """int64 [B, T]: the target shifted right."""
    wrong_ids: torch.Tensor | None
    """int64, padded like the others."""
    num_target_tokens: int
    """Target tokens without padding."""
    num_tokens: int
    """All tokens without padding, those of `wrong_ids` too."""
    num_places: int
    """The same with padding."""
    num_skipped: int
    """Examples passed over for those of this batch."""

    @property
    def has_padding(self) -> bool:
        """Whether any source is shorter than S."""
        return int(self.lengths.min()) < self.source_ids.shape[1]


def truncate(ids: np.ndarray, max_tokens: int, end: int) -> np.ndarray:
    """At most `max_tokens` ids; where something is cut, the last one is `end`."""
    if len(ids) <= max_tokens:
        return ids
    return np.append(ids[: max_tokens - 1], end).astype(ids.dtype)


def collate_prompts(
    examples: Sequence[EncodedPrompt], pad: int, start: int | None, max_width: int | None = None
) -> PromptBatch:
    """Merge examples; `start` is the decoder's first input, None leaves the decoder's input out."""
    longest_first = np.argsort([-len(example.source_ids) for example in examples], kind="stable")
    examples = [examples[i] for i in longest_first]

    def padded(sequences):
        return pad_batch([np.asarray(ids, dtype=np.int64) for ids in sequences], pad, max_width)

    columns = [[example.source_ids for example in examples]]
    columns.append([example.target_ids for example in examples])
    if examples[0].wrong_ids is not None:
        columns.append([example.wrong_ids for example in examples])
    batches = [padded(column) for column in columns]
    return PromptBatch(
        indices=torch.tensor([example.index for example in examples]),
        lengths=torch.tensor([len(ids) for ids in columns[0]]),
        source_ids=batches[0],
        target_ids=batches[1],
        decoder_input_ids=(
            None if start is None else padded([shift_right(ids, start) for ids in columns[1]])
        ),
        wrong_ids=batches[2] if len(batches) > 2 else None,
        num_target_tokens=sum(map(len, columns[1])),
        num_tokens=sum(len(ids) for column in columns for ids in column),
        num_places=sum(batch.numel() for batch in batches),
        num_skipped=sum(example.num_skipped for example in examples),
    )
