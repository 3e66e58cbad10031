"""Assignment of examples to batches: length-grouped or random, whatever the number of workers.

Shapes: B examples of a batch, P processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from metro.finetuning.collation import EncodedPrompt
from metro.finetuning.data import PromptData

GROUP = 64  # batches that are sorted by length together


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, position) for one process of P; shuffled by (seed, epoch).

    Length-grouped: a shuffled epoch is cut into groups of 64 * P batches, each group is sorted by
    length and cut into batches, and the batches are shuffled. All processes then work on batches of
    similar length at the same time. An epoch ends before a last set of batches that is not full for
    all processes, unless it is the only one; then it is filled up from its start.
    """

    def __init__(
        self,
        data: PromptData,
        batch_size: int,
        *,
        seed: int,
        batching: str = "length",
        process: int = 0,
        num_processes: int = 1,
    ):
        self.data, self.batch_size, self.seed, self.batching = data, batch_size, seed, batching
        self.process, self.num_processes = process, num_processes
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0 as the Trainer does."""
        self.epoch = epoch + 1

    def __len__(self) -> int:
        return max(1, len(self.data) // (self.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.positions()[self.process :: self.num_processes]:
            yield [(self.epoch, int(position)) for position in batch]

    def positions(self) -> np.ndarray:
        """Return the positions (P * batches, B) of this epoch, for all processes."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.data))
        order = np.resize(order, len(self) * self.num_processes * self.batch_size)
        if self.batching == "length":
            lengths = self.data.lengths(self.epoch)[order]
            group = np.arange(len(order)) // (GROUP * self.num_processes * self.batch_size)
            order = order[np.lexsort([-lengths, group])]
        sets = order.reshape(len(self), self.num_processes, self.batch_size)
        if self.batching == "length":
            sets = random.permutation(sets)
        return sets.reshape(-1, self.batch_size)


class EncodedPrompts(Dataset[EncodedPrompt | None]):
    """`PromptData` for a DataLoader whose keys are (epoch, position)."""

    def __init__(self, data: PromptData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> EncodedPrompt | None:
        epoch, position = key
        return self.data.encode(position, epoch)


class EpochLoader(DataLoader):
    """A DataLoader that passes the epoch on to its `EpochBatches`, as the Trainer expects."""

    batch_sampler: EpochBatches

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
