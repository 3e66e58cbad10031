"""Encoded prompts to padded batches; NumPy until a batch is complete.

Shapes: B examples, S encoder tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from metro.data.collation import pad_batch


class EncodedPrompt(NamedTuple):
    """Token ids of one example under an objective."""

    row: int
    """Its number inside its task."""
    source_ids: np.ndarray
    """Encoder ids, special tokens included."""
    target_ids: np.ndarray
    """Decoder target, end token included."""
    wrong_source_ids: np.ndarray | None = None
    """Encoder ids with a wrong label (flipped)."""
    wrong_target_ids: np.ndarray | None = None
    """Target ids of a wrong label (direct+ul)."""
    num_skipped: int = 0
    """Examples without a usable wrong label that were skipped in favour of this one."""
    cut_source_of: int | None = None
    """Number of its task, if its source was cut."""
    cut_target_of: int | None = None
    """Number of its task, if its target was cut."""


class PromptBatch(NamedTuple):
    """A padded batch, longest source first."""

    rows: torch.Tensor
    """int64 (B): `EncodedPrompt.row`."""
    lengths: torch.Tensor
    """int64 (B): source tokens without padding."""
    source_ids: torch.Tensor
    """int64 (B, S)."""
    target_ids: torch.Tensor
    """int64 (B, T)."""
    wrong_source_ids: torch.Tensor | None
    """int64 (B, S')."""
    wrong_target_ids: torch.Tensor | None
    """int64 (B, T')."""
    num_target_tokens: int
    """Target tokens without padding."""
    num_tokens: int
    """All tokens without padding, those of wrong labels included."""
    num_positions: int
    """The same with padding."""
    num_skipped: int
    """Examples skipped in favour of those of this batch."""
    cut_sources: list[int]
    """Number of the task of every example whose source was cut."""
    cut_targets: list[int]
    """The same of targets."""

    @property
    def has_padding(self) -> bool:
        """True if any source is shorter than S."""
        return int(self.lengths.min()) < self.source_ids.shape[1]


def truncate(ids: np.ndarray, max_tokens: int, end: int) -> np.ndarray:
    """Cut to `max_tokens` ids; where something is cut, the last one is `end`."""
    if len(ids) <= max_tokens:
        return ids
    return np.append(ids[: max_tokens - 1], end).astype(ids.dtype)


def collate_prompts(
    examples: Sequence[EncodedPrompt], pad: int, max_width: int | None = None
) -> PromptBatch:
    """Merge examples into a batch, padded with `pad` to at most `max_width` (see `pad_batch`)."""
    longest_first = np.argsort([-len(example.source_ids) for example in examples], kind="stable")
    examples = [examples[i] for i in longest_first]

    def padded(sequences: Sequence[np.ndarray]) -> torch.Tensor:
        return pad_batch([np.asarray(ids, dtype=np.int64) for ids in sequences], pad, max_width)

    sources = [example.source_ids for example in examples]
    targets = [example.target_ids for example in examples]
    wrong_sources = [e.wrong_source_ids for e in examples if e.wrong_source_ids is not None]
    wrong_targets = [e.wrong_target_ids for e in examples if e.wrong_target_ids is not None]
    columns = [column for column in (sources, targets, wrong_sources, wrong_targets) if column]
    batches = [padded(column) for column in columns]
    return PromptBatch(
        rows=torch.tensor([example.row for example in examples]),
        lengths=torch.tensor([len(ids) for ids in sources]),
        source_ids=batches[0],
        target_ids=batches[1],
        wrong_source_ids=batches[2] if wrong_sources else None,
        wrong_target_ids=batches[-1] if wrong_targets else None,
        num_target_tokens=sum(map(len, targets)),
        num_tokens=sum(len(ids) for column in columns for ids in column),
        num_positions=sum(batch.numel() for batch in batches),
        num_skipped=sum(example.num_skipped for example in examples),
        cut_sources=[e.cut_source_of for e in examples if e.cut_source_of is not None],
        cut_targets=[e.cut_target_of for e in examples if e.cut_target_of is not None],
    )
