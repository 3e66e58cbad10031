"""Examples of an epoch of a prompt mixture: every task up to its cap, as a moving window.

T0 (Sanh et al., ICLR 2022) caps each template at 500,000 // (templates of its dataset) examples. A
task with more examples than its cap is read in one fixed permutation, over and over: an epoch
starts behind the last example of the epoch before.

Shapes: N examples of an epoch, K tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metro.utils.messages import UserError


class ExamplePlace(NamedTuple):
    """Location of an example in a mixture."""

    task: int
    """Number of its task."""
    row: int
    """Its number inside the task."""


class CappedMixture:
    """Tasks of `sizes` examples, of which an epoch takes at most `caps` (None: all).

    Epochs count from 1. Within an epoch examples are ordered by task.

    Raises:
        UserError: a cap is below 1, or there is not a single example.
    """

    def __init__(self, sizes: Sequence[int], caps: Sequence[int | None], seed: int):
        if len(sizes) != len(caps):
            raise UserError(f"{len(sizes)} tasks but {len(caps)} caps; give one cap per task")
        for task, cap in enumerate(caps):
            if cap is not None and cap < 1:
                raise UserError(f"the cap of task {task} is {cap}; use 1 or more, or leave it out")
        if min(sizes, default=0) < 0 or sum(sizes) == 0:
            raise UserError(f"a mixture of {len(sizes)} tasks without a single example")
        self.counts = [
            int(size if cap is None else min(size, cap))
            for size, cap in zip(sizes, caps, strict=True)
        ]
        self.ends = np.cumsum(self.counts, dtype=np.int64)
        # One generator per task: adding a task does not change what is taken of the others.
        self.permutations = [
            _permutation(size, seed) if size > count else None
            for size, count in zip(sizes, self.counts, strict=True)
        ]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, task: int, epoch: int) -> np.ndarray:
        """Return the rows that an epoch takes of one task, in order."""
        count, permutation = self.counts[task], self.permutations[task]
        if permutation is None:
            return np.arange(count)
        return permutation[(epoch * count + np.arange(count)) % len(permutation)]

    def all_rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tasks (N) and rows (N) of a whole epoch."""
        tasks = np.repeat(np.arange(len(self.counts)), self.counts)
        rows = [self.rows(task, epoch) for task in range(len(self.counts))]
        return tasks, np.concatenate(rows)

    def locate(self, position: int, epoch: int) -> ExamplePlace:
        """Return task and row of one example, without building the whole epoch."""
        task = int(np.searchsorted(self.ends, position, side="right"))
        row = position - int(self.ends[task]) + self.counts[task]
        permutation = self.permutations[task]
        if permutation is not None:
            row = int(permutation[(epoch * self.counts[task] + row) % len(permutation)])
        return ExamplePlace(task, row)


def _permutation(size: int, seed: int) -> np.ndarray:
    order = np.random.RandomState(seed).permutation(size)
    return order.astype(np.int32) if size < 2**31 else order


def order_by_source_and_target(
    source_lengths: np.ndarray, target_lengths: np.ndarray, seed: int
) -> np.ndarray:
    """Order examples by source length, then target length, then at random as `seed` decides."""
    ties = np.argsort(np.random.RandomState(seed).permutation(len(source_lengths)))
    return np.lexsort([ties, target_lengths, source_lengths])
