"""Training data from a folder of prepared prompts: what an epoch holds, and each example encoded.

Two ways of sampling. ``capped``: every template up to its cap, the window of T0
(`CappedMixture`). ``proportional``: every row of every dataset once (at most 500,000 of one),
under one template drawn uniformly among those that have the row, as FLIPPED does it.

Letters: N examples of an epoch, R rows of a dataset, K tasks (templates).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from metro.data.capped_mixture import CappedMixture
from metro.data.prompts.encoding import PromptEncoder
from metro.finetuning.collation import EncodedPrompt
from metro.finetuning.objectives import Unusable, check_objective, encode_example, stable_hash
from metro.utils.messages import UserError
from metro.utils.seeds import draws

SAMPLING = ("capped", "proportional")
ROWS_PER_DATASET = 500_000
MOST_SKIPPED = 100  # examples in a row without a use under the objective, before giving up
LENGTH_SAMPLES = 32
_TEMPLATE, _LABEL, _REPLACEMENT = 1, 2, 3  # purposes of draws


class EpochPlan(NamedTuple):
    """The examples of one epoch."""

    tasks: np.ndarray
    """[N] number of the task."""
    indices: np.ndarray
    """[N] number of the example inside its task."""


class PromptData:
    """The examples of one split under one objective.

    Args:
        folder: made by ``metro prepare-prompts`` (jsonl form).
        split: "train" or "valid".
        objective: see `metro.finetuning.objectives`.
        encoder: text to ids.
        seed: of the sampling and of the wrong labels.
        sampling: "capped", "proportional", or None: proportional for the mixture "flipped".
        limit: at most so many examples per task (per dataset where sampling is proportional).
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
        from metro.data.prompts.stored import PromptedExamples, read_manifest

        check_objective(objective)
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
        if sampling not in SAMPLING:
            raise UserError(f"sampling is {sampling!r}; use one of {', '.join(SAMPLING)}")
        self.objective, self.encoder, self.seed, self.replace = objective, encoder, seed, replace
        self.names, self.sampling, self.folder = list(tasks), sampling, Path(folder)
        self.examples = [
            PromptedExamples(Path(folder) / split / name / f"{split}.jsonl") for name in self.names
        ]
        self.rows = [examples.rows for examples in self.examples]
        if sampling == "capped":
            caps = [
                min(filter(None, (facts.get("cap"), limit)), default=None)
                for facts in tasks.values()
            ]
            self.mixture = CappedMixture([len(rows) for rows in self.rows], caps, seed)
        else:
            self._group(tasks, limit)
        self._plan: tuple[int, EpochPlan] | None = None
        self._length_fits: dict[int, tuple[float, float]] = {}

    def _group(self, tasks: dict[str, dict], limit: int | None) -> None:
        """Datasets, their rows, and which templates have which row."""
        groups: dict[tuple, list[int]] = {}
        for number, facts in enumerate(tasks.values()):
            groups.setdefault((facts["dataset"], facts["subset"]), []).append(number)
        self.groups = [np.array(members) for members in groups.values()]
        self.group_keys = [stable_hash("/".join(map(str, key))) for key in groups]
        self.group_rows = [
            np.unique(np.concatenate([self.rows[task] for task in members]))
            for members in self.groups
        ]
        cap = min(limit or ROWS_PER_DATASET, ROWS_PER_DATASET)
        sizes = [len(rows) for rows in self.group_rows]
        self.mixture = CappedMixture(sizes, [cap] * len(sizes), self.seed)

    def __len__(self) -> int:
        return len(self.mixture)

    def plan(self, epoch: int) -> EpochPlan:
        """Which examples an epoch holds; epochs count from 1. The last plan is remembered."""
        if self._plan is None or self._plan[0] != epoch:
            if self.sampling == "capped":
                plan = EpochPlan(*self.mixture.all_rows(epoch))
            else:
                parts = [self._draw_templates(group, epoch) for group in range(len(self.groups))]
                plan = EpochPlan(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            self._plan = (epoch, plan)
        return self._plan[1]

    def _draw_templates(self, group: int, epoch: int) -> EpochPlan:
        """Rows of a dataset in one epoch, each under one of the templates that have it."""
        rows = self.group_rows[group][self.mixture.rows(group, epoch)]
        members = self.groups[group]
        places = np.stack([np.searchsorted(self.rows[task], rows) for task in members])  # K,R
        has_row = np.stack(
            [
                self.rows[task][np.minimum(place, len(self.rows[task]) - 1)] == rows
                for task, place in zip(members, places, strict=True)
            ]
        )
        drawn = draws(self.seed, _TEMPLATE, epoch, self.group_keys[group], rows)
        wanted = (drawn % has_row.sum(0).astype(np.uint64)).astype(np.int64)
        chosen = (np.cumsum(has_row, 0) == wanted + 1).argmax(0)  # the first such template has it
        return EpochPlan(members[chosen], places[chosen, np.arange(len(rows))])

    def lengths(self, epoch: int) -> np.ndarray:
        """[N] tokens of each example (source and target), estimated from its bytes.

        For grouping examples of similar length: nothing is read but a few examples of each task.
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
        """Tokens as a linear function of bytes, from a few examples of a task."""
        if task not in self._length_fits:
            count = len(self.examples[task])
            sample = np.unique(np.linspace(0, count - 1, min(count, LENGTH_SAMPLES)).astype(int))
            measured = []
            for index in sample:
                encoded = self._encode(task, int(index), epoch=0)
                if not isinstance(encoded, Unusable):
                    offsets = self.examples[task].offsets
                    num_bytes = int(offsets[index + 1] - offsets[index])
                    measured.append((num_bytes, len(encoded.source_ids) + len(encoded.target_ids)))
            x, y = np.array(measured or [(1.0, 1.0)], dtype=np.float64).T
            varies = len(x) > 1 and x.std() > 0
            slope = max(0.0, float(np.cov(x, y, bias=True)[0, 1] / x.var())) if varies else 0.0
            self._length_fits[task] = (float(y.mean() - slope * x.mean()), slope)
        return self._length_fits[task]

    def encode(self, position: int, epoch: int) -> EncodedPrompt | None:
        """One example of an epoch.

        Raises:
            ValueError: with ``replace``, none of many examples can be used under the objective.
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
                    f"{len(reasons)} examples of {self.folder} in a row cannot be used under the "
                    f"objective {self.objective} ({', '.join(sorted(set(reasons)))}); prepare a "
                    "mixture of tasks with options (metro prepare-prompts --mixture flipped)"
                )
            drawn = draws(self.seed, _REPLACEMENT, epoch, position, len(reasons))
            place = int(drawn % np.uint64(len(self)))

    def _encode(self, task: int, index: int, epoch: int) -> EncodedPrompt | Unusable:
        example = self.examples[task][index]
        label = draws(self.seed, _LABEL, epoch, stable_hash(self.names[task]), example["row"])
        try:
            return encode_example(example, index, self.objective, self.encoder, int(label))
        except Unusable as reason:
            return reason


def default_sampling(manifest: dict) -> str:
    """How a mixture is sampled where nothing else is asked for."""
    by_data_set = manifest.get("cap_of", "template") == "data_set"
    return "proportional" if by_data_set or manifest.get("mixture") == "flipped" else "capped"
