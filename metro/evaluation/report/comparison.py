"""Runs beside published rows: the numbers of every format of the report, computed once.

One section per suite. Its columns are the tasks that a run has results of, its rows the runs, each
followed by the difference to the published row of the same model, then the published rows, then the
accuracy of guessing. Values are fractions; the formats print percent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metro.evaluation.report.naming import colours, labels, model_name, suite_title
from metro.evaluation.runs.published import PublishedRow
from metro.evaluation.runs.run_folder import Run
from metro.evaluation.runs.summary import Summary, TaskSummary, aggregate, summarize
from metro.models.registry import SUITES
from metro.utils.messages import counted

SUITE_METRICS = {"label_generalization": "macro_f1"}
"""Metric that the papers print for a suite, where it is not the accuracy."""


@dataclass
class ReportRun:
    """A run with the names that the report gives it."""

    run: Run
    summary: Summary
    label: str
    model: str
    """Title of the model alone."""
    colour: int
    """Number of its colour and shape, the same in every section for the same model and method."""
    published: PublishedRow | None = None
    """First published row of the same model and method, which the run is compared with."""


@dataclass
class Row:
    """A line of the table."""

    kind: str
    """run, difference, published or chance."""
    label: str
    detail: str = ""
    """Method of a run, source of a published row."""
    values: dict[str, float] = field(default_factory=dict)
    average: float | None = None
    num_averaged: int = 0
    """Tasks that the average is over, of minimal pairs paradigms."""
    partial: frozenset[str] = frozenset()
    """Tasks whose value is over a part of the prompts."""
    run_index: int | None = None
    """Index of its run in the section."""
    best: frozenset[str] = frozenset()
    """Tasks (and "average") where this run is the best of several."""
    compared: bool = False
    """True for a published row that a run is compared with."""

    @property
    def says_method(self) -> bool:
        """True if the label of a run contains its method."""
        return f", {self.detail}" in self.label


@dataclass
class Section:
    """Runs and published rows of a suite."""

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
        """Source -> its letter, for the published rows in the table."""
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
    def is_of_pairs(self) -> bool:
        return self.runs[0].summary.is_of_pairs

    @property
    def averaged_unit(self) -> str:
        """What each counts the same in the average."""
        return "paradigm" if self.is_of_pairs else "task"

    @property
    def num_units(self) -> int:
        """Number of them that a full average is over: tasks shown, paradigms listed."""
        return self.runs[0].summary.num_listed if self.is_of_pairs else len(self.tasks)

    @property
    def partial_remark(self) -> str:
        """What the sign of a partial task means."""
        if self.is_of_pairs:
            return "a part of the paradigms"
        return "a part of the prompts, not in the average"

    @property
    def metric_title(self) -> str:
        return self.metric.replace("macro_f1", "macro-F1")

    @property
    def one_prompt(self) -> bool:
        """True if no task has several prompts, so that there is no spread over prompts."""
        return all(task.num_listed == 1 for run in self.runs for task in run.summary.tasks.values())

    def value(self, task: TaskSummary) -> float | None:
        return task.mean if self.metric == "accuracy" else task.macro_f1

    def values_per_prompt(self, task: TaskSummary) -> dict[str, float]:
        return task.accuracies if self.metric == "accuracy" else task.macro_f1s

    def median(self, task: TaskSummary) -> float | None:
        return aggregate(list(self.values_per_prompt(task).values()), np.median)


def source_parts(source: str) -> list[str]:
    """Sources of a row; model cards, of which every model has its own, share one name."""
    parts = ["model card" if part.startswith("model card") else part for part in source.split("; ")]
    return list(dict.fromkeys(parts))


def compare(
    runs: Sequence[Run],
    published: Sequence[PublishedRow] = (),
    titles: Mapping[str, str] | None = None,
) -> list[Section]:
    """Make one section per suite, in the order of SUITES, suites of the user's last.

    Args:
        runs: each with at least one result; no folder twice.
        published: rows to show, in this order; a run is compared with the first row of its model,
            if it was evaluated by the same method.
        titles: name of a registered model -> its title.
    """
    models = [model_name(run, titles or {}) for run in runs]
    known = [*SUITES, *(run.suite for run in runs)]
    sections = []
    for suite in sorted({run.suite for run in runs}, key=known.index):
        members = [number for number, run in enumerate(runs) if run.suite == suite]
        named = zip(
            members, labels(runs, models, members), colours(runs, models, members), strict=True
        )
        report_runs = [
            ReportRun(runs[number], summarize(runs[number]), label, models[number], colour)
            for number, label, colour in named
        ]
        sections.append(make_section(suite, report_runs, published))
    return sections


def make_section(suite: str, runs: list[ReportRun], published: Sequence[PublishedRow]) -> Section:
    metric = SUITE_METRICS.get(suite, "accuracy")
    published = [row for row in published if row.suite == suite]
    for report_run in runs:
        key = report_run.run.registered, report_run.run.method
        own = [row for row in published if (row.model, row.method or key[1]) == key]
        report_run.published = own[0] if own else None
    tasks_of_runs = ((*run.run.tasks, *run.run.by_task()) for run in runs)
    listed = list(dict.fromkeys(task for tasks in tasks_of_runs for task in tasks))
    with_result = {task for report_run in runs for task in report_run.summary.tasks}
    tasks = [task for task in listed if task in with_result]
    section = Section(suite, metric, tasks, runs, published, rows=[], notes=[])
    section.rows = make_rows(section)
    section.notes = make_notes(section, listed)
    return section


def make_rows(section: Section) -> list[Row]:
    """Make the rows of runs, differences, published numbers and guessing."""
    rows = []
    for index, report_run in enumerate(section.runs):
        row = run_row(section, report_run, index)
        rows.append(row)
        if report_run.published is not None:
            rows.append(difference_row(row, report_run.published))
    limits = [report_run.summary.limit for report_run in section.runs]
    most = None if None in limits else max(filter(None, limits), default=None)
    own = [row for row in rows if row.kind == "run"]
    mark_best([row for row, limit in zip(own, limits, strict=True) if limit == most])
    for published in section.published:
        values = {task: value for task, value in published.values.items() if task in section.tasks}
        if values:
            # No average over fewer tasks: it would stand beside averages over all of them.
            whole = list(values.values()) if len(values) == len(section.tasks) else []
            row = Row("published", published.title, published.source, values, aggregate(whole))
            row.compared = any(published is report_run.published for report_run in section.runs)
            row.num_averaged = len(values)
            rows.append(row)
    chances = {
        task: summary.chance
        for report_run in reversed(section.runs)
        for task, summary in report_run.summary.tasks.items()
        if summary.chance is not None and section.metric == "accuracy"  # not stated of macro-F1
    }
    if chances:
        average = aggregate(list(chances.values()))
        number = section.num_units if section.is_of_pairs else len(chances)
        rows.append(Row("chance", "guessing", "", chances, average, number))
    for row in rows:
        if section.is_of_pairs and row.kind in ("difference", "published"):
            row.average = None  # it would be over phenomena
    return rows


def run_row(section: Section, report_run: ReportRun, index: int) -> Row:
    tasks = report_run.summary.tasks
    values = {
        name: value for name, task in tasks.items() if (value := section.value(task)) is not None
    }
    whole = [value for name, value in values.items() if tasks[name].complete]
    average, num_averaged = aggregate(whole), len(whole)
    if section.is_of_pairs:
        average, num_averaged = report_run.summary.average, report_run.summary.num_averaged
    return Row(
        kind="run",
        label=report_run.label,
        detail=report_run.run.method,
        values=values,
        average=average,
        num_averaged=num_averaged,
        partial=frozenset(name for name, task in tasks.items() if not task.complete),
        run_index=index,
    )


def difference_row(row: Row, published: PublishedRow) -> Row:
    """Subtract published values from a run's; average over the tasks that both have in full."""
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
        average=aggregate(whole),
        num_averaged=len(whole),
        partial=row.partial & values.keys(),
        run_index=row.run_index,
    )


def mark_best(rows: list[Row]) -> None:
    """Mark the highest of several runs per task, and of averages if all are over as many tasks.

    Args:
        rows: of the runs over the most examples; those limited further are never the best.
    """
    if len(rows) < 2:
        return
    complete = [
        {task: value for task, value in row.values.items() if task not in row.partial}
        for row in rows
    ]
    if len({row.num_averaged for row in rows}) == 1:
        for values, row in zip(complete, rows, strict=True):
            if row.average is not None:
                values["average"] = row.average
    best: dict[str, float] = {}
    for values in complete:
        best |= {task: max(value, best.get(task, value)) for task, value in values.items()}
    for values, row in zip(complete, rows, strict=True):
        row.best = frozenset(task for task, value in values.items() if value == best[task])


def make_notes(section: Section, listed: list[str]) -> list[str]:
    """Remarks on a section whose suite lists some tasks."""
    found = []
    if len(section.tasks) < len(listed) and not section.is_of_pairs:
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
