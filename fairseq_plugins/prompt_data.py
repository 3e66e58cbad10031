"""Prompt-finetuning data as fairseq takes it: binarised tasks, or prompts kept as text.

Which examples an epoch holds is decided in `metro.data.capped_mixture` and `metro.finetuning.data`;
padding in `metro.finetuning.collation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fairseq.data import FairseqDataset

from metro.data.blocks import batch_by_size
from metro.data.capped_mixture import order_by_source_and_target
from metro.data.indexed_file import check_split
from metro.data.prepared_folder import PROMPTS_MANIFEST
from metro.finetuning.collation import EncodedPrompt, collate_prompts
from metro.finetuning.data import BinarisedTasks, PromptData
from metro.finetuning.losses import shift_targets
from metro.utils.files import inside, read_json
from metro.utils.messages import UserError

TRAIN_CAPS, VALID_GROUPS = "data_cap.json", "valid_datasets.json"


@dataclass(frozen=True)
class PromptCollation:
    """Merges examples into fairseq's sample."""

    pad: int
    start: int
    """First input of the decoder."""
    max_width: int | None
    """Longest sequence that the model takes."""

    def __call__(self, examples: list[EncodedPrompt]) -> dict:
        batch = collate_prompts(examples, self.pad, self.max_width)
        net_input = {
            "src_tokens": batch.source_ids,
            "src_lengths": batch.lengths,
            "has_padding": batch.has_padding,
        }
        if batch.wrong_source_ids is not None:  # METRO's losses shift the target themselves
            net_input["wrong_source_ids"] = batch.wrong_source_ids
        else:
            shifted = shift_targets(batch.target_ids, self.start, self.pad)
            net_input["prev_output_tokens"] = shifted
        return {
            "id": batch.rows,
            "nsentences": len(examples),
            "ntokens": batch.num_target_tokens,
            "net_input": net_input,
            "target": batch.target_ids,
            "num_skipped": batch.num_skipped,
        }


class EpochDataset(FairseqDataset):
    """Base of both kinds: examples change from epoch to epoch, and with them the batches."""

    def __init__(self, collation: PromptCollation, seed: int):
        super().__init__()
        self.collation, self.seed = collation, seed
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
        return self.collation(usable) if usable else {}

    def size(self, index: int) -> tuple[int, int]:
        return int(self.source_sizes[index]), int(self.target_sizes[index])

    def num_tokens(self, index: int) -> int:
        return int(self.num_tokens_vec(index))

    def num_tokens_vec(self, indices) -> np.ndarray:
        """The longer of both; as published, one position more is counted for a target."""
        return (self.target_sizes[indices] + 1).clip(min=self.source_sizes[indices])

    def ordered_indices(self) -> np.ndarray:
        return order_by_source_and_target(self.source_sizes, self.target_sizes, self.seed)

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
    """Tasks written by `metro prepare-prompts --vocab`, each up to its cap."""

    def __init__(self, tasks: BinarisedTasks, **kwargs):
        super().__init__(**kwargs)
        self.tasks = tasks
        self.measure()

    def measure(self) -> None:
        self.source_sizes, self.target_sizes = self.tasks.sizes(self.epoch)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> EncodedPrompt:
        return self.tasks.encode(int(index), self.epoch)


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
        self.source_sizes = lengths.clip(max=self.data.encoder.max_source_length)
        self.target_sizes = lengths.clip(max=self.data.encoder.max_target_length)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> EncodedPrompt | None:
        return self.data.encode(int(index), self.data_epoch)


def task_names(folder: Path, split: str) -> tuple[list[str], list[int | None]]:
    """Read the tasks of a split and their caps.

    `train` and `valid` mean all tasks of the folder; `valid_NAME` a group of valid_datasets.json.
    """
    kind, _, group = split.partition("_")
    where = folder / kind
    caps = read_json(where / TRAIN_CAPS)
    if caps is None:
        raise UserError(
            f"no {where / TRAIN_CAPS}; task.data has to be a folder made by metro prepare-prompts "
            "(with --vocab for the binarised form), and splits are train, valid or valid_GROUP"
        )
    names = list(caps)
    if group:
        groups = read_json(where / VALID_GROUPS) or {}
        if group not in groups:
            raise UserError(
                f"there is no group {group!r} in {where / VALID_GROUPS} for the split {split!r}; "
                f"use one of {', '.join(f'{kind}_{name}' for name in groups) or 'valid'}"
            )
        names = groups[group]
    for name in names:
        if name not in caps:
            raise UserError(f"{where / TRAIN_CAPS} has no cap for {name!r} of the split {split!r}")
        for side in ("src", "tgt"):
            check_split(inside(where, name) / f"{kind}.src-tgt.{side}")
    return names, [caps[name] for name in names]


def is_text(folder: str | Path) -> bool:
    """Check whether a folder of prepared prompts is of the jsonl form."""
    manifest = read_json(Path(folder) / PROMPTS_MANIFEST)
    return manifest is not None and manifest.get("format") == "jsonl"
