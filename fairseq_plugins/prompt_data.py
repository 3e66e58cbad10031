"""Prompt-finetuning data as fairseq takes it: binarised tasks, or prompts kept as text.

Which examples an epoch holds is decided in `metro.data.capped_mixture` and `metro.finetuning.data`;
padding in `metro.finetuning.collation`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fairseq.data import FairseqDataset

from fairseq_plugins.data import check_files
from metro.data.blocks import batch_by_size
from metro.data.capped_mixture import CappedMixture, order_by_lengths
from metro.data.prompted_examples import MANIFEST
from metro.finetuning.collation import EncodedPrompt, truncate
from metro.finetuning.data import PromptData

TRAIN_CAPS, VALID_GROUPS = "data_cap.json", "valid_datasets.json"


class EpochDataset(FairseqDataset):
    """What both kinds share: examples change from epoch to epoch, and with them the batches."""

    def __init__(self, collate: Callable[[list[EncodedPrompt]], dict], seed: int):
        super().__init__()
        self.collate, self.seed = collate, seed
        self.epoch = 1

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        return False

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self.measure()

    def measure(self) -> None:
        """Set `source_sizes` and `target_sizes` of this epoch's examples."""
        raise NotImplementedError

    def collater(self, examples: list[EncodedPrompt | None]) -> dict:
        usable = [example for example in examples if example is not None]
        return self.collate(usable) if usable else {}

    def size(self, index: int) -> tuple[int, int]:
        return int(self.source_sizes[index]), int(self.target_sizes[index])

    def num_tokens(self, index: int) -> int:
        return int(self.num_tokens_vec(index))

    def num_tokens_vec(self, indices) -> np.ndarray:
        """The longer of both; as published, one place more is counted for a target."""
        return np.maximum(self.source_sizes[indices], self.target_sizes[indices] + 1)

    def ordered_indices(self) -> np.ndarray:
        return order_by_lengths(self.source_sizes, self.target_sizes, self.seed)

    def batch_by_size(
        self, indices, max_tokens=None, max_sentences=None, required_batch_size_multiple=1
    ) -> list[np.ndarray]:
        indices = np.asarray(indices)
        sizes = self.num_tokens_vec(indices)
        return batch_by_size(
            indices, sizes, max_tokens, max_sentences, required_batch_size_multiple
        )

    def filter_indices_by_size(self, indices, max_sizes) -> tuple[np.ndarray, list[int]]:
        """Examples whose source and target fit, and those that do not."""
        most_source, most_target = max_sizes
        fits = (self.source_sizes[indices] <= most_source) & (
            self.target_sizes[indices] <= most_target
        )
        return indices[fits], indices[~fits].tolist()


class BinarisedPrompts(EpochDataset):
    """Tasks written by `metro prepare-prompts --vocab`, each up to its cap.

    `sources[k]` and `targets[k]` are the stored sequences of task k: without `<s>`, with `</s>`.
    `max_source` and `max_target` cut sequences (special tokens included); None leaves them.
    """

    def __init__(
        self,
        sources: list,
        targets: list,
        caps: list[int | None],
        *,
        max_source: int | None,
        max_target: int | None,
        bos: int,
        eos: int,
        num_words: int,
        name: str,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for task, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if len(source) != len(target):
                raise ValueError(
                    f"task {task} of {name} has {len(source)} sources but {len(target)} targets; "
                    "prepare it again with metro prepare-prompts"
                )
        self.sources, self.targets, self.name = sources, targets, name
        self.max_source, self.max_target = max_source, max_target
        self.bos, self.eos, self.num_words = bos, eos, num_words
        self.mixture = CappedMixture([len(source) for source in sources], caps, self.seed)
        self.measure()

    def measure(self) -> None:
        rows = [self.mixture.rows(task, self.epoch) for task in range(len(self.sources))]

        def sizes(parts, num_added: int, limit: int | None) -> np.ndarray:
            found = [
                np.asarray(part.sizes)[chosen] for part, chosen in zip(parts, rows, strict=True)
            ]
            together = np.concatenate(found) + num_added
            return together if limit is None else np.minimum(together, limit)

        self.source_sizes = sizes(self.sources, 1, self.max_source)  # <s>
        self.target_sizes = sizes(self.targets, 0, self.max_target)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> EncodedPrompt:
        task, row = self.mixture.locate(int(index), self.epoch)
        source, target = self.sources[task][row].numpy(), self.targets[task][row].numpy()
        if max(source.max(), target.max()) >= self.num_words:
            raise ValueError(
                f"{self.name} holds id {max(source.max(), target.max())} (example {row} of task "
                f"{task}), but dict.txt ends at id {self.num_words - 1}; use the dict.txt that the "
                "data was binarised with"
            )
        if self.max_source is not None:
            source = truncate(source, self.max_source - 1, self.eos)
        if self.max_target is not None:
            target = truncate(target, self.max_target, self.eos)
        return EncodedPrompt(row, np.insert(source, 0, self.bos), target)


class TextPrompts(EpochDataset):
    """Prompts kept as text (`metro prepare-prompts --format jsonl`), encoded when they are read.

    Lengths are estimates, source and target together. Validation (`is_train` false) reads the same
    examples with the same wrong labels every time.
    """

    def __init__(self, data: PromptData, *, is_train: bool, **kwargs):
        super().__init__(**kwargs)
        self.data, self.is_train = data, is_train
        self.measure()

    @property
    def data_epoch(self) -> int:
        return self.epoch if self.is_train else 0

    def measure(self) -> None:
        lengths = self.data.lengths(self.data_epoch)
        self.source_sizes = np.minimum(lengths, self.data.encoder.max_source_length)
        self.target_sizes = np.minimum(lengths, self.data.encoder.max_target_length)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> EncodedPrompt | None:
        return self.data.encode(int(index), self.data_epoch)


def task_names(folder: Path, split: str) -> tuple[list[str], list[int | None]]:
    """Tasks of a split and their caps.

    `train` and `valid` mean all tasks of the folder; `valid_NAME` a group of valid_datasets.json.
    """
    kind, _, group = split.partition("_")
    where = folder / kind
    if not (where / TRAIN_CAPS).is_file():
        raise FileNotFoundError(
            f"no {where / TRAIN_CAPS}; task.data has to be a folder made by metro prepare-prompts "
            "(with --vocab for the binarised form), and splits are train, valid or valid_GROUP"
        )
    caps = read_json(where / TRAIN_CAPS)
    names = list(caps)
    if group:
        groups = read_json(where / VALID_GROUPS) if (where / VALID_GROUPS).is_file() else {}
        if group not in groups:
            raise ValueError(
                f"there is no group {group!r} in {where / VALID_GROUPS} for the split {split!r}; "
                f"use one of {', '.join(f'{kind}_{name}' for name in groups) or 'valid'}"
            )
        names = groups[group]
    for name in names:
        if name not in caps:
            raise ValueError(f"{where / TRAIN_CAPS} has no cap for {name!r} of the split {split!r}")
        for side in ("src", "tgt"):
            check_files(str(where / name / f"{kind}.src-tgt.{side}"))
    return names, [caps[name] for name in names]


def is_text(folder: str | Path) -> bool:
    """Whether a folder of prepared prompts is of the jsonl form."""
    manifest = Path(folder) / MANIFEST
    return manifest.is_file() and read_json(manifest).get("format") == "jsonl"


def read_json(path: str | os.PathLike) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); prepare the data again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold a JSON object; prepare the data again")
    return content
