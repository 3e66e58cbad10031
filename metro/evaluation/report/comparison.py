"""Runs beside published rows: what every format of the report shows, computed once.

One section per suite. Its columns are the tasks that a run has results of, its rows the runs, each
followed by the difference to the published row of the same model, then the published rows, then the
accuracy of guessing. Values are fractions here; percent is a matter of printing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metro.evaluation.report.naming import colours, labels, model_name, suite_title
from metro.evaluation.runs.published import PublishedRow
from metro.evaluation.runs.run_folder import Run
from metro.evaluation.runs.summary import Summary, TaskSummary, summarize
from metro.models.registry import SUITES
from metro.utils.messages import UserError, counted

# What the papers print for a suite; accuracy where it is not named.
SUITE_METRICS = {"label_generalization": "macro_f1"}
METRIC_TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


@dataclass
class ReportRun:
    """A run as the report names it."""

    run: Run
    summary: Summary
    label: str
    model: str
    """The model alone, as the report calls it."""
    colour: int
    """Number of its colour and shape, the same in every section for the same model and method."""
    published: PublishedRow | None = None
    """What it is compared with: the first published row of the same model and method."""


@dataclass
class Row:
    """One line of the table."""

    kind: str
    """run, difference, published or chance."""
    label: str
    detail: str = ""
    """Method of a run, source of a published row."""
    values: dict[str, float] = field(default_factory=dict)
    average: float | None = None
    num_averaged: int = 0
    partial: frozenset[str] = frozenset()
    """Tasks whose value is of a part of the prompts."""
    run_index: int | None = None
    """Which run of the section it belongs to."""
    colour: int | None = None
    """As of its run."""
    best: frozenset[str] = frozenset()
    """Tasks (and "average") where this run is the best of several."""
    compared: bool = False
    """Of a published row: whether a run is compared with it."""

    @property
    def says_method(self) -> bool:
        """Whether the label of a run has its method."""
        return f", {self.detail}" in self.label


@dataclass
class Section:
    """One suite."""

    suite: str
    metric: str
    tasks: list[str]
    runs: list[ReportRun]
    published: list[PublishedRow]
    rows: list[Row]
    notes: list[str]

    @property
    def title(self) -> str:
        return suite_title(self.suite, [report_run.run for report_run in self.runs])

    @property
    def sources(self) -> dict[str, str]:
        """Letter of every source of the published rows that the table shows."""
        parts = [source_parts(row.detail) for row in self.rows if row.kind == "published"]
        shown = dict.fromkeys(part for row in parts for part in row)
        return {source: chr(ord("a") + number) for number, source in enumerate(shown)}

    def letters(self, row: Row) -> str:
        """The letters of a published row's sources."""
        return ", ".join(self.sources[part] for part in source_parts(row.detail))

    @property
    def other_published(self) -> list[PublishedRow]:
        """Published rows other than those that a run is compared with."""
        own = [run.published for run in self.runs]
        return [row for row in self.published if row not in own]

    @property
    def chances(self) -> dict[str, float]:
        """Task -> accuracy of guessing."""
        return next((row.values for row in self.rows if row.kind == "chance"), {})

    def scale(self) -> tuple[int, int]:
        """Round ends in percent around all values, at least 20 points apart."""
        values = [v for row in self.rows if row.kind != "difference" for v in row.values.values()]
        for run in self.runs:
            for task in run.summary.tasks.values():
                values += self.values_per_prompt(task).values()
        low = 10 * math.floor(10 * min(values, default=0) + 1e-9)
        high = 10 * math.ceil(10 * max(values, default=1) - 1e-9)
        while high - low < 20:
            low, high = max(0, low - 10), min(100, high + 10)
        return low, high

    @property
    def metric_title(self) -> str:
        return METRIC_TITLES[self.metric]

    @property
    def one_prompt(self) -> bool:
        """Whether no task has several prompts, so that there is no spread to speak of."""
        return all(task.num_listed == 1 for run in self.runs for task in run.summary.tasks.values())

    def value(self, task: TaskSummary) -> float | None:
        return task.mean if self.metric == "accuracy" else task.macro_f1

    def values_per_prompt(self, task: TaskSummary) -> dict[str, float]:
        return task.accuracies if self.metric == "accuracy" else task.macro_f1s

    def median(self, task: TaskSummary) -> float | None:
        values = list(self.values_per_prompt(task).values())
        return float(np.median(values)) if values else None

    def chance(self, task: TaskSummary) -> float | None:
        """Accuracy of guessing; of macro-F1 nobody states one."""
        return task.chance if self.metric == "accuracy" else None


def source_parts(source: str) -> list[str]:
    """The sources of a row; cards, of which every model has its own, are all called the same."""
    parts = ["model card" if part.startswith("model card") else part for part in source.split("; ")]
    return list(dict.fromkeys(parts))


def compare(
    runs: Sequence[Run],
    published: Sequence[PublishedRow] = (),
    titles: Mapping[str, str] | None = None,
) -> list[Section]:
    """Sections, one per suite, in the order of SUITES, suites of the user's last.

    Args:
        runs: at least one; each with at least one result; no folder twice.
        published: rows to show, in this order; a run of one of these models is compared with the
            first row of it, if it was evaluated by the same method.
        titles: what registered models are called.
    """
    check_runs(runs)
    models = [model_name(run, titles or {}) for run in runs]
    known = [*SUITES, *(run.suite for run in runs)]
    sections = []
    for suite in sorted({run.suite for run in runs}, key=known.index):
        members = [number for number, run in enumerate(runs) if run.suite == suite]
        report_runs = [
            ReportRun(runs[number], summarize(runs[number]), label, models[number], colour)
            for number, label, colour in zip(
                members, labels(runs, models, members), colours(runs, models, members), strict=True
            )
        ]
        sections.append(make_section(suite, report_runs, published))
    return sections


def check_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise UserError("no run to report on: give the folders that `metro evaluate` wrote")
    seen: dict[Path, Path] = {}
    for run in runs:
        if not run.results:
            raise UserError(
                f"{run.folder} has no finished prompt yet (results.jsonl is empty or missing): "
                "leave it out, or let `metro evaluate` go on"
            )
        real = run.folder.resolve()
        if real in seen:
            raise UserError(f"{run.folder} is given twice: give every run once")
        seen[real] = run.folder


def make_section(suite: str, runs: list[ReportRun], published: Sequence[PublishedRow]) -> Section:
    metric = SUITE_METRICS.get(suite, "accuracy")
    published = [row for row in published if row.suite == suite]
    for report_run in runs:
        key = report_run.run.registered, report_run.run.method
        own = [row for row in published if (row.model, row.method or key[1]) == key]
        report_run.published = own[0] if own else None
    listed = list(
        dict.fromkeys(
            task
            for report_run in runs
            for task in [*report_run.run.tasks, *report_run.run.by_task()]
        )
    )
    with_result = {task for report_run in runs for task in report_run.summary.tasks}
    section = Section(
        suite=suite,
        metric=metric,
        tasks=[task for task in listed if task in with_result],
        runs=runs,
        published=published,
        rows=[],
        notes=[],
    )
    section.rows = make_rows(section)
    section.notes = make_notes(section, listed)
    return section


def make_rows(section: Section) -> list[Row]:
    rows = []
    for index, report_run in enumerate(section.runs):
        row = run_row(section, report_run, index)
        rows.append(row)
        if report_run.published is not None:
            rows.append(difference_row(row, report_run.published))
    mark_best([row for row in rows if row.kind == "run"])
    for published in section.published:
        values = {
            task: published.values[task] for task in section.tasks if task in published.values
        }
        if values:
            # No average over fewer tasks: it would stand beside averages over all of them.
            whole = len(values) == len(section.tasks)
            average = float(np.mean(list(values.values()))) if whole else None
            row = Row("published", published.title, published.source, values, average, len(values))
            row.compared = any(published is report_run.published for report_run in section.runs)
            rows.append(row)
    chances = {
        task: chance
        for report_run in reversed(section.runs)
        for task, summary in report_run.summary.tasks.items()
        if (chance := section.chance(summary)) is not None
    }
    if chances:
        average = float(np.mean(list(chances.values())))
        rows.append(Row("chance", "guessing", "", chances, average, len(chances)))
    return rows


def run_row(section: Section, report_run: ReportRun, index: int) -> Row:
    tasks = report_run.summary.tasks
    values = {
        name: value for name, task in tasks.items() if (value := section.value(task)) is not None
    }
    whole = [value for name, value in values.items() if tasks[name].complete]
    return Row(
        kind="run",
        label=report_run.label,
        detail=report_run.run.method,
        values=values,
        average=float(np.mean(whole)) if whole else None,
        num_averaged=len(whole),
        partial=frozenset(name for name, task in tasks.items() if not task.complete),
        run_index=index,
        colour=report_run.colour,
    )


def difference_row(row: Row, published: PublishedRow) -> Row:
    """Run minus published; its average is over the tasks that both have in full."""
    values = {
        task: value - published.values[task]
        for task, value in row.values.items()
        if task in published.values
    }
    whole = [value for task, value in values.items() if task not in row.partial]
    return Row(
        kind="difference",
        label="to published",
        detail=published.source,
        values=values,
        average=float(np.mean(whole)) if whole else None,
        num_averaged=len(whole),
        partial=row.partial & values.keys(),
        run_index=row.run_index,
        colour=row.colour,
    )


def mark_best(rows: list[Row]) -> None:
    """The highest of several runs, per task; the average only where all are over as many tasks."""
    if len(rows) < 2:
        return
    best: dict[str, float] = {}
    for row in rows:
        for task, value in row.values.items():
            if task not in row.partial:
                best[task] = max(value, best.get(task, value))
    if len({row.num_averaged for row in rows}) == 1 and rows[0].num_averaged:
        best["average"] = max(row.average for row in rows)
    for row in rows:
        values = {**row.values, "average": row.average}
        row.best = frozenset(
            task for task, value in best.items()
            if values.get(task) == value and task not in row.partial
        )  # fmt: skip


def make_notes(section: Section, listed: list[str]) -> list[str]:
    found = []
    if len(section.tasks) < len(listed):
        found.append(
            f"averages, published ones too, are over the {counted(len(section.tasks), 'task')} "
            f"shown; the suite lists {len(listed)}"
        )
    said: dict[str, list[str]] = {}
    for report_run in section.runs:
        for note in report_run.summary.notes:
            said.setdefault(note, []).append(report_run.label)
    for note, names in said.items():
        everyone = len(names) == len(section.runs)
        found.append(note if everyone else f"{'; '.join(names)}: {note}")
    runs = [report_run.run for report_run in section.runs]
    for option in dict.fromkeys(name for run in runs for name in run.options):
        values = {run.options.get(option) for run in runs}
        if len(values) > 1 and option != "limit":  # which is said of each run
            shown = sorted("default" if value is None else str(value) for value in values)
            found.append(f"runs differ in --{option.replace('_', '-')}: {', '.join(shown)}")
    return found
