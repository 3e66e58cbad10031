"""Sources of a mixture's examples, and the plan of the work: parts, their rows and caps.

Two sources: rows and templates, or P3 (``bigscience/P3`` on the hub), whose prompts are ready
rendered: one configuration per task, fields ``inputs_pretokenized``, ``targets_pretokenized`` and
in some tasks ``answer_choices``.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import NamedTuple

from metro.data import datasets
from metro.data.datasets import DatasetUnavailable, name_of
from metro.data.jsonl_rows import UnusableRow
from metro.data.own_rows import read_rows
from metro.data.prompts.mixtures import Mixture, find_mixture
from metro.data.prompts.sandbox import unprotect
from metro.data.prompts.templates import PromptTemplate, RenderedExample, TemplateTree
from metro.data.settings import PreparePromptsSettings
from metro.utils.identity import files_identity
from metro.utils.messages import UserError

P3 = "bigscience/P3"
SAMPLED_ROWS = 16


@dataclass(frozen=True)
class P3Task(PromptTemplate):
    """A task of P3 in place of a template: its rows are rendered already."""

    def render(self, row: dict, *, seed: int | None = 0) -> RenderedExample:
        fields = {"inputs_pretokenized", "targets_pretokenized"}
        if missing := tuple(sorted(fields - set(row))):
            return RenderedExample("", "", None, None, missing)
        text, target = (
            unprotect(str(row[name])).strip()
            for name in ("inputs_pretokenized", "targets_pretokenized")
        )
        choices = row.get("answer_choices") or None
        choices = [str(choice).strip() for choice in choices] if choices else None
        label = choices.index(target) if choices and target in choices else None
        return RenderedExample(text, target, choices, label, ())


class PartPlan(NamedTuple):
    """One side (train or valid) of one dataset with all its templates; no rows are loaded."""

    dataset: str
    subset: str | None
    side: str
    templates: tuple[PromptTemplate, ...]
    cap: int
    """Most examples of each template in an epoch (of all together: ``cap_of: dataset``)."""

    @property
    def name(self) -> str:
        """Name of the dataset, and of the task where that is a part of its own."""
        is_task = isinstance(self.templates[0], P3Task)
        name = name_of(self.dataset, self.subset)
        return f"{name}/{self.templates[0].task_name}" if is_task else name

    @property
    def key(self) -> str:
        return f"{self.side}/{self.name}"


class SplitRows(NamedTuple):
    """Rows of a split of a dataset."""

    split: str
    rows: Sequence[dict]


class PartRow(NamedTuple):
    """One row of a part."""

    number: int
    """Number in the part, whose splits follow one another."""
    split: str
    split_row: int
    """Number in the split."""
    row: dict | UnusableRow
    """Fields of the row, or the reason why it cannot be read."""


class Part(NamedTuple):
    """The rows of one side of one dataset, for all its templates."""

    plan: PartPlan
    splits: tuple[SplitRows, ...]
    limit: int | None
    """Rows to take, spread evenly: datasets may be sorted by label."""

    @property
    def num_rows(self) -> int:
        total = sum(len(split.rows) for split in self.splits)
        return total if self.limit is None else min(total, self.limit)

    def rows(self, start: int, stop: int) -> Iterator[PartRow]:
        """Yield the start-th to the stop-th of the rows taken."""
        total = sum(len(split.rows) for split in self.splits)
        wanted = [i * total // self.num_rows for i in range(start, stop)]
        first = 0
        for split, rows in self.splits:
            inside = [i - first for i in wanted if first <= i < first + len(rows)]
            for index, row in read_rows(rows, inside):
                yield PartRow(first + index, split, index, row)
            first += len(rows)


class Unavailable(NamedTuple):
    """A dataset, or one side of it, that is not available."""

    side: str
    name: str
    reason: str

    @property
    def reason_of_any(self) -> str:
        """The reason without the name, as without a network all datasets have one."""
        return re.sub(rf"(?<![\w/]){re.escape(self.name)}(?![\w/])", "it", self.reason, count=1)


class PromptSources:
    """The parts of a mixture and their rows.

    Args:
        mixture: the prompt tasks wanted.
        tree: templates (with P3, too: they say which tasks there are).
        options: the source, the local datasets (for P3: ``P3/<task>/<split>.jsonl``), the tasks to
            validate on, and the limits of rows.
    """

    def __init__(self, mixture: Mixture, tree: TemplateTree, options: PreparePromptsSettings):
        if options.source == "p3" and mixture.cap_of == "dataset":
            raise UserError(
                f"mixture {mixture.name} cannot come from P3, whose prompts do not say which part "
                "is the instruction: leave source out"
            )
        self.mixture, self.tree = mixture.in_tree(tree), tree
        self.source, self.data_dir = options.source, options.data_dir
        self.validation = options.validation
        self.nothing_made = f"mixture {mixture.name}: not a single example could be made"
        self.limits = {"train": options.limit, "valid": options.valid_limit or options.limit}

    @cached_property
    def _plan(self) -> tuple[list[PartPlan], list[Unavailable]]:
        plans, unavailable = [], []
        named: dict[tuple[str, str], str] = {}  # (side, task) -> template
        validated = self._validation_mixture()
        for dataset, subset in self.mixture.datasets:
            for side in ("train", "valid"):
                mixture = self.mixture if side == "train" else validated
                if mixture is None or (side == "train" and mixture.validation_only):
                    continue
                try:
                    templates = mixture.templates(self.tree, dataset, subset)
                except UserError as error:
                    if side == "train" or self.mixture.validation_only:
                        unavailable.append(Unavailable(side, name_of(dataset, subset), str(error)))
                    continue
                unusable = dict(self.tree.damaged(dataset, subset))
                for template in list(templates):
                    where = f"{template.name!r} of {name_of(dataset, subset)}"
                    other = named.setdefault((side, template.task_name), where)
                    if other != where:
                        templates.remove(template)
                        unusable[template.name] = (
                            f"templates {other} and {where} both make the task "
                            f"{template.task_name}: rename one of them"
                        )
                unavailable += [
                    Unavailable(side, f"{name_of(dataset, subset)}/{name}", reason)
                    for name, reason in unusable.items()
                ]
                if not templates:
                    continue  # left out by the mixture's own rules
                cap = mixture.cap_per_template(len(templates))
                if self.source == "p3":
                    for template in templates:
                        task = (P3Task(*astuple(template)),)
                        plans.append(PartPlan(dataset, subset, side, task, cap))
                else:
                    plans.append(PartPlan(dataset, subset, side, tuple(templates), cap))
        return plans, unavailable

    def plans(self) -> list[PartPlan]:
        """Return the parts in the mixture's order; no rows are loaded."""
        return self._plan[0]

    def left_out(self) -> dict[str, str]:
        """Return tasks that the mixture's own rules leave out, and the reasons."""
        found = {}
        for dataset, subset in self.mixture.datasets:
            try:
                templates = self.tree.templates(dataset, subset)
            except UserError:
                continue  # listed as unavailable
            for template in templates:
                if reason := self.mixture.reason_to_leave_out(template):
                    found[template.task_name] = reason
        return found

    def without_templates(self) -> list[Unavailable]:
        return self._plan[1]

    def _validation_mixture(self) -> Mixture | None:
        if self.validation == "none":
            return None
        if self.validation == "published" and self.mixture.validation:
            return find_mixture(self.mixture.validation)
        return self.mixture

    def splits(self, plan: PartPlan) -> list[str]:
        """Return the splits of a side: ``train*`` is train, all others are valid.

        P3 has rendered splits without labels, too, so that the table of the dataset decides.

        Raises:
            DatasetUnavailable: the dataset has no such side, or is not available.
        """
        found = datasets.available_splits(*self._names(plan), data_dir=self.data_dir)
        entry = datasets.dataset_table().get(name_of(plan.dataset, plan.subset))
        usable = found
        if self.source == "p3" and entry and entry.splits:
            usable = [split for split in found if split in entry.splits]
        wanted = [split for split in usable if split.startswith("train") == (plan.side == "train")]
        if not wanted:
            side = "training" if plan.side == "train" else "validation"
            raise DatasetUnavailable(f"no {side} split with labels: it has {', '.join(found)}")
        return wanted

    def local_files(self) -> list[list]:
        """Return name and content (as a digest) of every local file that will be read."""
        found: list[list] = []
        if self.data_dir is None:
            return found
        for plan in self.plans():
            try:
                for split in self.splits(plan):
                    for place in datasets.local_files(self.data_dir, *self._names(plan), split):
                        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
                        for file in files or [place]:
                            name = file.relative_to(self.data_dir).as_posix()
                            found.append([name, files_identity([file])])
            except (UserError, OSError):
                continue  # listed when it is loaded
        return found

    def stray_files(self) -> list[str]:
        """Return the names of local files beside the splits, which nothing reads."""
        found: dict[str, None] = {}
        if self.data_dir is None:
            return []
        for plan in self.plans():
            with suppress(UserError, OSError):  # listed when it is loaded
                for path in datasets.stray_files(self.data_dir, *self._names(plan)):
                    found[path.relative_to(self.data_dir).as_posix()] = None
        return list(found)

    def load(self, plan: PartPlan) -> Part:
        """Load the rows of a part.

        Raises:
            DatasetUnavailable: they are not available.
        """
        names = self._names(plan)
        splits = tuple(
            SplitRows(split, datasets.load_rows(*names, split, data_dir=self.data_dir))
            for split in self.splits(plan)
        )
        part = Part(plan, splits, self.limits[plan.side])
        if not part.num_rows:
            raise DatasetUnavailable(f"{name_of(*names)} has no rows")
        return part

    def sample(self, plan: PartPlan) -> tuple[Part, int]:
        """Load a few rows of a part, and count all of them, without downloading the dataset.

        Raises:
            DatasetUnavailable: they are not available.
        """
        if self.data_dir is not None:
            part = self.load(plan)
            return part._replace(limit=min(SAMPLED_ROWS, part.num_rows)), part.num_rows
        names, splits, total = self._names(plan), [], 0
        for split in self.splits(plan):
            rows, num_rows = datasets.peek(*names, split, SAMPLED_ROWS)
            splits.append(SplitRows(split, rows))
            total += num_rows
        limit = self.limits[plan.side]
        part = Part(plan, tuple(splits), SAMPLED_ROWS)
        return part, total if limit is None else min(total, limit)

    def _names(self, plan: PartPlan) -> tuple[str, str | None]:
        if self.source != "p3":
            return plan.dataset, plan.subset
        task = plan.templates[0].task_name
        return (P3, task) if self.data_dir is None else ("P3", task)
