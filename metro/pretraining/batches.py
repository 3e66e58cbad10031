"""The order of training: epochs, batches, updates, and the share of each process, as fairseq's.

Blocks sorted by length are cut into batches of at most ``max_tokens``, the batches are shuffled by
(seed, epoch) and dealt out to the processes in turn; ``update_freq`` batches of a process are one
update. A process without a batch in the last round of an epoch computes another one without its
gradient, so that all take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from metro.data.collation import MaskedBatch
from metro.pretraining.dataset import Batch, PretrainingDataset
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import UserError


class Position(NamedTuple):
    """Place in the data of one process."""

    epoch: int = 1
    done: int = 0
    """Batches of the epoch that were trained on."""
    of: int = 0
    """Batches of the epoch; 0: not known yet."""

    def among(self, number: int) -> int:
        """Return the place in an epoch of ``number`` batches: behind the same share of it."""
        return self.done if self.of in (0, number) else self.done * number // self.of


class MicroBatch(NamedTuple):
    """A batch, or one that only keeps the processes together."""

    batch: Batch
    counts: bool
    """False: without gradient and out of all sums."""


class Update(NamedTuple):
    """The batches of one update."""

    micro_batches: list[MicroBatch]
    after: Position


class Share(NamedTuple):
    """Which of the processes this one is."""

    process: int = 0
    num_processes: int = 1


START, ALONE = Position(), Share()


def num_items(batch: Batch, settings: PretrainingSettings) -> int:
    """Positions of the main model's loss, by which gradients are divided."""
    if not isinstance(batch, MaskedBatch):
        return batch.num_target_tokens
    if settings.masked_positions_only == "none":
        return batch.num_tokens
    return int(batch.is_masked.sum())


def num_text_tokens(batch: Batch) -> int:
    """Tokens of the text, without padding."""
    return batch.num_tokens if isinstance(batch, MaskedBatch) else batch.num_text_tokens


def cut_into_batches(
    dataset: PretrainingDataset, settings: PretrainingSettings
) -> list[np.ndarray]:
    """Return the batches of a dataset, shortest first; blocks that are too long are left out.

    Raises:
        UserError: all are too long.
    """
    indices = dataset.ordered_indices()
    fits = dataset.sizes[indices] <= settings.tokens_per_sample
    if not fits.any():
        raise UserError(
            f"every item of {dataset.name} has more than tokens_per_sample - 1 = "
            f"{settings.tokens_per_sample - 1} tokens: raise it, or cut items with shorten_method"
        )
    return dataset.batch_by_size(
        indices[fits],
        settings.max_tokens,
        settings.batch_size,
        settings.required_batch_size_multiple,
    )


def shuffled(batches: Sequence[np.ndarray], seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches in the order of an epoch."""
    order = list(batches)
    np.random.RandomState(seed + epoch).shuffle(order)
    return order


def dealt(batches: Sequence[np.ndarray], share: Share) -> list[np.ndarray]:
    """Return every P-th batch; empty ones fill up the last round."""
    own = list(batches[share.process :: share.num_processes])
    rounds = -(-len(batches) // share.num_processes)
    return own + [np.zeros(0, dtype=np.int64)] * (rounds - len(own))


def merge_or_none(examples: Sequence, dataset: PretrainingDataset) -> Batch | None:
    """Make a batch of examples; None of none."""
    return dataset.merge(examples) if examples else None


def load(
    dataset: PretrainingDataset,
    batches: Sequence[np.ndarray],
    substitute: np.ndarray,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """Yield the examples of each batch, merged; ``substitute`` stands in for empty ones."""
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=partial(merge_or_none, dataset=dataset),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    for batch in loader:
        counts = batch is not None
        yield MicroBatch(batch or dataset.merge([dataset[i] for i in substitute]), counts)


class Updates:
    """The updates of one process, without end.

    Args:
        open_epoch: returns the dataset of an epoch.
        settings: of the run.
        share: of this process.
        position: where to begin.
        pin_memory: for copies to a GPU.
    """

    def __init__(
        self,
        open_epoch: Callable[[int], PretrainingDataset],
        settings: PretrainingSettings,
        share: Share = ALONE,
        position: Position = START,
        pin_memory: bool = False,
    ):
        self.open_epoch, self.settings, self.share = open_epoch, settings, share
        self.position, self.pin_memory = position, pin_memory

    def __iter__(self) -> Iterator[Update]:
        position, settings = self.position, self.settings
        dataset, frozen = None, []
        while True:
            epoch = position.epoch
            opened = self.open_epoch(epoch)
            if opened is not dataset:
                dataset, frozen = opened, cut_into_batches(opened, settings)
            dataset.set_epoch(epoch)
            batches = dealt(shuffled(frozen, settings.seed, epoch), self.share)
            whole, size = len(batches), settings.update_freq
            place = position.among(whole)
            if settings.skip_remainder_batch:  # as fairseq: the last batch, then the last update
                batches = batches[: (whole - 1) // size * size]
                if not batches:
                    raise UserError(
                        f"an epoch has {whole} batches of each process, of which "
                        f"skip_remainder_batch leaves none with update_freq {size}: leave it out"
                    )
            batches_left = load(
                dataset, batches[place:], frozen[0], settings.num_workers, self.pin_memory
            )
            for start in range(place, len(batches), size):
                micro_batches = list(islice(batches_left, size))
                done = start + len(micro_batches)
                is_end = done == len(batches)
                after = Position(epoch + 1) if is_end else Position(epoch, done, whole)
                yield Update(micro_batches, after)
            position = Position(epoch + 1)
