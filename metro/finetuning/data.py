"""Finetuning examples: `PromptData` of prompts kept as text, `BinarisedTasks` of stored ids.

Both hold the examples of one epoch after the other. Two ways of sampling text: ``capped`` takes
every template up to its cap, the window of T0 (`CappedMixture`); ``proportional`` takes every row
of every dataset once (at most 500,000 of one), under one template drawn uniformly among those that
have the row, as FLIPPED does.

Shapes: N examples of an epoch, R rows of a dataset, K tasks (templates).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metro.data.capped_mixture import CappedMixture
from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.stored import PromptedExamples, read_manifest
from metro.finetuning.collation import EncodedPrompt, truncate
from metro.finetuning.objectives import Unusable, encode_example
from metro.utils.messages import UserError
from metro.utils.seeds import draws

ROWS_PER_DATASET = 500_000
MOST_SKIPPED = 100  # consecutive examples that cannot be used under the objective
LENGTH_SAMPLES = 32
_TEMPLATE, _LABEL, _REPLACEMENT = 1, 2, 3  # purposes of draws


class EpochPlan(NamedTuple):
    """The examples of one epoch."""

    tasks: np.ndarray
    """(N) number of the task."""
    indices: np.ndarray
    """(N) number of the example inside its task."""


class PromptData:
    """The examples of one split under one objective.

    Args:
        folder: made by ``metro prepare-prompts`` (jsonl form).
        split: "train" or "valid".
        objective: see `metro.finetuning.objectives`.
        encoder: text to ids.
        seed: of the sampling and of the wrong labels.
        sampling: "capped", "proportional", or None: proportional for the mixture "flipped".
        limit: most examples per task (per dataset where sampling is proportional).
        replace: take another example of the epoch where one cannot be used (for training); else
            `encode` returns None there.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        objective: str,
        encoder: PromptEncoder,
        *,
        seed: int,
        sampling: str | None = None,
        limit: int | None = None,
        replace: bool = True,
    ):
        if limit is not None and limit < 1:
            raise UserError(f"the limit is {limit} examples per task; use 1 or more")
        manifest = read_manifest(folder)
        if manifest["format"] != "jsonl":
            raise UserError(
                f"{folder} holds binarised prompts (format {manifest['format']}), which fairseq "
                "reads: fairseq-train --task t5_prompt_finetuning. For metro finetune prepare them "
                "with metro prepare-prompts --format jsonl"
            )
        tasks = {
            name: facts
            for name, facts in manifest["splits"].get(split, {}).items()
            if facts["num_examples"] > 0
        }
        if not tasks:
            raise UserError(
                f"{folder} has no examples in the split {split!r} "
                f"(splits: {', '.join(manifest['splits']) or 'none'}); prepare them with "
                "metro prepare-prompts"
            )
        sampling = sampling or default_sampling(manifest)
        self.objective, self.encoder, self.seed, self.replace = objective, encoder, seed, replace
        self.sampling, self.folder = sampling, Path(folder)
        self.examples = [
            PromptedExamples(Path(folder) / split / name / f"{split}.jsonl") for name in tasks
        ]
        self.rows = [examples.rows for examples in self.examples]
        self.task_keys = [_stable_hash(name) for name in tasks]
        if sampling == "capped":
            sizes = [len(rows) for rows in self.rows]
            caps = [
                min(filter(None, (facts.get("cap"), limit)), default=None)
                for facts in tasks.values()
            ]
        else:
            groups: dict[str, list[int]] = {}  # tasks of each dataset
            for number, facts in enumerate(tasks.values()):
                groups.setdefault(f"{facts['dataset']}/{facts['subset']}", []).append(number)
            self.groups = [np.array(members) for members in groups.values()]
            self.group_keys = [_stable_hash(name) for name in groups]
            self.group_rows = [
                np.unique(np.concatenate([self.rows[task] for task in members]))
                for members in self.groups
            ]
            sizes = [len(rows) for rows in self.group_rows]
            caps = [min(limit or ROWS_PER_DATASET, ROWS_PER_DATASET)] * len(sizes)
        self.mixture = CappedMixture(sizes, caps, seed)
        self._plan: tuple[int, EpochPlan] | None = None
        self._length_fits: dict[int, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self.mixture)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the examples of an epoch, counted from 1. The last plan is remembered."""
        if self._plan is None or self._plan[0] != epoch:
            if self.sampling == "capped":
                plan = EpochPlan(*self.mixture.all_rows(epoch))
            else:
                parts = [self._draw_templates(group, epoch) for group in range(len(self.groups))]
                plan = EpochPlan(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            self._plan = (epoch, plan)
        return self._plan[1]

    def _draw_templates(self, group: int, epoch: int) -> EpochPlan:
        """Draw one of the templates that have it for each row of a dataset in one epoch."""
        rows = self.group_rows[group][self.mixture.rows(group, epoch)]
        members = self.groups[group]
        indices = np.stack([np.searchsorted(self.rows[task], rows) for task in members])  # K,R
        has_row = np.stack(
            [
                self.rows[task][np.minimum(index, len(self.rows[task]) - 1)] == rows
                for task, index in zip(members, indices, strict=True)
            ]
        )
        drawn = draws(self.seed, _TEMPLATE, epoch, self.group_keys[group], rows)
        wanted = (drawn % has_row.sum(0).astype(np.uint64)).astype(np.int64)
        chosen = (np.cumsum(has_row, 0) == wanted + 1).argmax(0)  # the first such template has it
        return EpochPlan(members[chosen], indices[chosen, np.arange(len(rows))])

    def task_name(self, position: int, epoch: int = 0) -> str:
        """Name of the task that an example of an epoch is of."""
        return self.examples[self.plan(epoch).tasks[position]].path.parent.name

    def lengths(self, epoch: int) -> np.ndarray:
        """Estimate the tokens (N) of each example, source and target, from its bytes.

        For grouping examples of similar length: only a few examples of each task are read.
        """
        tasks, indices = self.plan(epoch)
        lengths = np.zeros(len(tasks))
        for task in np.unique(tasks):
            chosen = tasks == task
            offsets, (base, slope) = self.examples[task].offsets, self._fit_lengths(int(task))
            num_bytes = offsets[indices[chosen] + 1] - offsets[indices[chosen]]
            lengths[chosen] = base + slope * num_bytes
        most = self.encoder.max_source_length + self.encoder.max_target_length
        return np.clip(np.rint(lengths), 1, most).astype(np.int64)

    def _fit_lengths(self, task: int) -> tuple[float, float]:
        """Fit tokens as a linear function of bytes, from a few examples of a task."""
        if task not in self._length_fits:
            count, offsets = len(self.examples[task]), self.examples[task].offsets
            sample = np.unique(np.linspace(0, count - 1, min(count, LENGTH_SAMPLES)).astype(int))
            measured: list[tuple[float, float]] = []
            for index in sample:
                encoded = self._encode(task, int(index), epoch=0)
                if not isinstance(encoded, Unusable):
                    num_bytes = int(offsets[index + 1] - offsets[index])
                    measured.append((num_bytes, len(encoded.source_ids) + len(encoded.target_ids)))
            x, y = np.array(measured or [(1.0, 1.0)], dtype=np.float64).T
            varies = len(x) > 1 and x.std() > 0
            slope = max(0.0, float(np.cov(x, y, bias=True)[0, 1] / x.var())) if varies else 0.0
            self._length_fits[task] = (float(y.mean() - slope * x.mean()), slope)
        return self._length_fits[task]

    def encode(self, position: int, epoch: int) -> EncodedPrompt | None:
        """Encode one example of an epoch.

        Raises:
            UserError: with ``replace``, none of many examples can be used under the objective.
        """
        plan, place = self.plan(epoch), position
        reasons: list[str] = []
        while True:
            encoded = self._encode(int(plan.tasks[place]), int(plan.indices[place]), epoch)
            if not isinstance(encoded, Unusable):
                return encoded._replace(num_skipped=len(reasons))
            reasons.append(str(encoded))
            if not self.replace:
                return None
            if len(reasons) >= min(MOST_SKIPPED, 10 * len(self)):
                raise UserError(
                    f"{len(reasons)} consecutive examples of {self.folder} cannot be used under "
                    f"the objective {self.objective} ({', '.join(sorted(set(reasons)))}); prepare "
                    "a mixture of tasks with answer choices (metro prepare-prompts --mixture "
                    "flipped)"
                )
            drawn = draws(self.seed, _REPLACEMENT, epoch, position, len(reasons))
            place = int(drawn % np.uint64(len(self)))

    def _encode(self, task: int, index: int, epoch: int) -> EncodedPrompt | Unusable:
        encoder = self.encoder
        num_cut = encoder.num_cut_sources, encoder.num_cut_targets
        try:
            example = self.examples[task][index]
            label = draws(self.seed, _LABEL, epoch, self.task_keys[task], example["row"])
            encoded = encode_example(example, index, self.objective, encoder, int(label))
        except UnusableRow as error:
            return Unusable(error.reason)
        except Unusable as reason:
            return reason
        return encoded._replace(
            cut_source_of=task if encoder.num_cut_sources > num_cut[0] else None,
            cut_target_of=task if encoder.num_cut_targets > num_cut[1] else None,
        )


def default_sampling(manifest: dict) -> str:
    """Return the sampling of a mixture where the user names none."""
    by_dataset = manifest.get("cap_of") in ("dataset", "data_set")  # the latter of earlier versions
    return "proportional" if by_dataset or manifest.get("mixture") == "flipped" else "capped"


def _stable_hash(text: str) -> int:
    """Hash text to the same number in every process."""
    return zlib.crc32(text.encode("utf-8"))


class BinarisedTasks:
    """Tasks of stored (source, target) pairs (`metro prepare-prompts --vocab`), each up to its cap.

    Args:
        sources, targets: per task the stored sequences, without `<s>` and with `</s>`; each has
            `sizes` and gives tensors.
        caps: most examples of each task in an epoch.
        max_source, max_target: where to cut sequences (special tokens included); None leaves them.
        bos, eos: ids of `<s>` and `</s>`.
        vocab_size: size of the vocabulary; higher ids are refused.
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
        vocab_size: int,
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
        self.bos, self.eos, self.vocab_size = bos, eos, vocab_size
        self.mixture = CappedMixture([len(source) for source in sources], caps, seed)

    def __len__(self) -> int:
        return len(self.mixture)

    def sizes(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of sources (N) and of targets (N), special ones included."""
        rows = [self.mixture.rows(task, epoch) for task in range(len(self.sources))]

        def measure(sequences: Sequence, num_added: int, limit: int | None) -> np.ndarray:
            sizes = [
                np.asarray(of_task.sizes)[chosen]
                for of_task, chosen in zip(sequences, rows, strict=True)
            ]
            total = np.concatenate(sizes) + num_added
            return total if limit is None else np.minimum(total, limit)

        sources = measure(self.sources, 1, self.max_source)  # <s>
        return sources, measure(self.targets, 0, self.max_target)

    def encode(self, position: int, epoch: int) -> EncodedPrompt:
        """Return one example of an epoch."""
        task, row = self.mixture.locate(position, epoch)
        source, target = self.sources[task][row].numpy(), self.targets[task][row].numpy()
        highest = max(source.max(), target.max())
        if highest >= self.vocab_size:
            raise UserError(
                f"{self.name} holds id {highest} (example {row} of task {task}), but dict.txt ends "
                f"at id {self.vocab_size - 1}; use the dict.txt that the data was binarised with"
            )
        if self.max_source is not None:
            source = truncate(source, self.max_source - 1, self.eos)
        if self.max_target is not None:
            target = truncate(target, self.max_target, self.eos)
        return EncodedPrompt(row, np.insert(source, 0, self.bos), target)
