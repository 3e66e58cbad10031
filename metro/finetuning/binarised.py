"""Binarised prompt tasks (`metro prepare-prompts --vocab`): what an epoch holds, and each example.

Letters: N examples of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metro.data.capped_mixture import CappedMixture
from metro.finetuning.collation import EncodedPrompt, truncate
from metro.utils.messages import UserError


class BinarisedTasks:
    """Tasks of stored (source, target) pairs, each up to its cap.

    Args:
        sources, targets: per task the stored sequences, without `<s>` and with `</s>`; each has
            `sizes` and gives tensors.
        caps: most examples of each task in an epoch.
        max_source, max_target: where to cut sequences (special tokens included); None leaves them.
        bos, eos: ids of `<s>` and `</s>`.
        num_words: ids of the vocabulary; higher ones are refused.
        seed: of the window of the capped tasks.
        name: of the data, for messages.
    """

    def __init__(
        self,
        sources: Sequence,
        targets: Sequence,
        caps: Sequence[int | None],
        *,
        max_source: int | None,
        max_target: int | None,
        bos: int,
        eos: int,
        num_words: int,
        seed: int,
        name: str,
    ):
        for task, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if len(source) != len(target):
                raise UserError(
                    f"task {task} of {name} has {len(source)} sources but {len(target)} targets; "
                    "prepare it again with metro prepare-prompts"
                )
        self.sources, self.targets, self.name = sources, targets, name
        self.max_source, self.max_target = max_source, max_target
        self.bos, self.eos, self.num_words = bos, eos, num_words
        self.mixture = CappedMixture([len(source) for source in sources], caps, seed)

    def __len__(self) -> int:
        return len(self.mixture)

    def sizes(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the sources [N] and of the targets [N], special ones included."""
        rows = [self.mixture.rows(task, epoch) for task in range(len(self.sources))]

        def measure(parts, num_added: int, limit: int | None) -> np.ndarray:
            found = [
                np.asarray(part.sizes)[chosen] for part, chosen in zip(parts, rows, strict=True)
            ]
            together = np.concatenate(found) + num_added
            return together if limit is None else np.minimum(together, limit)

        return (
            measure(self.sources, 1, self.max_source),  # <s>
            measure(self.targets, 0, self.max_target),
        )

    def encode(self, position: int, epoch: int) -> EncodedPrompt:
        """One example of an epoch."""
        task, row = self.mixture.locate(position, epoch)
        source, target = self.sources[task][row].numpy(), self.targets[task][row].numpy()
        highest = max(source.max(), target.max())
        if highest >= self.num_words:
            raise UserError(
                f"{self.name} holds id {highest} (example {row} of task {task}), but dict.txt ends "
                f"at id {self.num_words - 1}; use the dict.txt that the data was binarised with"
            )
        if self.max_source is not None:
            source = truncate(source, self.max_source - 1, self.eos)
        if self.max_target is not None:
            target = truncate(target, self.max_target, self.eos)
        return EncodedPrompt(row, np.insert(source, 0, self.bos), target)


def longer(source_sizes: np.ndarray, target_sizes: np.ndarray) -> np.ndarray:
    """The longer of both, example by example."""
    return np.maximum(source_sizes, target_sizes)
