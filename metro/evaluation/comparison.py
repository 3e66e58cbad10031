"""Runs beside published rows: what every format of the report shows, computed once.

One section per suite. Its columns are the tasks that a run has results of, its rows the runs, each
followed by the difference to the published row of the same model, then the published rows, then the
accuracy of guessing. Values are fractions here; percent is a matter of printing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metro.evaluation.published import PublishedRow
from metro.evaluation.results import Run
from metro.evaluation.summary import Summary, TaskSummary, notes, summarize

SUITE_TITLES = {
    "t0": "T0 Eval",
    "flipped14": "FLIPPED’s 14 sets",
    "bigbench": "BIG-bench",
    "label_generalization": "Label generalisation",
    "mmlu": "MMLU",
}
TASK_TITLES = {
    "rte": "RTE",
    "cb": "CB",
    "anli_r1": "ANLI R1",
    "anli_r2": "ANLI R2",
    "anli_r3": "ANLI R3",
    "wsc": "WSC",
    "winogrande": "Winogrande",
    "copa": "COPA",
    "story_cloze": "StoryCloze",
    "hellaswag": "HellaSwag",
    "wic": "WiC",
    "piqa": "PIQA",
    "arc_challenge": "ARC-C",
    "openbookqa": "OpenbookQA",
    "paws": "PAWS",
    "strategyqa": "StrategyQA",
    "winowhy": "WinoWhy",
    "vitaminc_fact_verification": "VitaminC fact verification",
    "imdb": "IMDB",
}
# What the papers print for a suite; accuracy where it is not named.
SUITE_METRICS = {"label_generalization": "macro_f1"}
METRIC_TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


@dataclass
class ReportRun:
    """A run as the report names it."""

    run: Run
    summary: Summary
    label: str
    published: PublishedRow | None = None
    """What it is compared with: the published row of the same model, the first that is listed."""


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
    best: frozenset[str] = frozenset()
    """Tasks (and "average") where this run is the best of several."""
    compared: bool = False
    """Of a published row: whether a run is compared with it."""


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
        return SUITE_TITLES.get(self.suite, title_case(self.suite))

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


def task_title(task: str) -> str:
    return TASK_TITLES.get(task, title_case(task))


def title_case(name: str) -> str:
    text = re.sub(r"\bus\b", "US", name.replace("_", " ").strip())
    return text[:1].upper() + text[1:]


def compare(
    runs: Sequence[Run],
    published: Sequence[PublishedRow] = (),
    titles: Mapping[str, str] | None = None,
) -> list[Section]:
    """Sections, one per suite, in the order in which the suites first appear.

    Args:
        runs: at least one; each with at least one result; no folder twice.
        published: rows to show, in this order; a run of one of these models is compared with the
            first row of it.
        titles: what registered models are called.
    """
    check_runs(runs)
    suites = list(dict.fromkeys(run.suite for run in runs))
    return [
        make_section(
            suite,
            [run for run in runs if run.suite == suite],
            [row for row in published if row.suite == suite],
            titles or {},
        )
        for suite in suites
    ]


def check_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("no run to report on: give the folders that `metro evaluate` wrote")
    seen: dict[Path, Path] = {}
    for run in runs:
        if not run.results:
            raise ValueError(
                f"{run.folder} has no finished prompt yet (results.jsonl is empty or missing): "
                "leave it out, or let `metro evaluate` go on"
            )
        real = run.folder.resolve()
        if real in seen:
            raise ValueError(f"{run.folder} is given twice: give every run once")
        seen[real] = run.folder


def make_section(
    suite: str, runs: list[Run], published: list[PublishedRow], titles: Mapping[str, str]
) -> Section:
    metric = SUITE_METRICS.get(suite, "accuracy")
    own: dict[str, PublishedRow] = {}
    for row in published:
        own.setdefault(row.model, row)
    report_runs = [
        ReportRun(run, summarize(run), label, own.get(run.registered or ""))
        for run, label in zip(runs, labels(runs, titles), strict=True)
    ]
    listed = list(dict.fromkeys(task for run in runs for task in [*run.tasks, *run.by_task()]))
    with_result = {task for report_run in report_runs for task in report_run.summary.tasks}
    section = Section(
        suite=suite,
        metric=metric,
        tasks=[task for task in listed if task in with_result],
        runs=report_runs,
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
            f"averages, published ones too, are over the {len(section.tasks)} tasks shown; the "
            f"suite lists {len(listed)}"
        )
    several = len(section.runs) > 1
    for report_run in section.runs:
        prefix = f"{report_run.label}: " if several else ""
        found += [prefix + note for note in notes(report_run.summary)]
    for option in ("split", "limit"):
        values = {str(report_run.run.options.get(option)) for report_run in section.runs}
        if len(values) > 1:
            found.append(f"runs differ in --{option}: {', '.join(sorted(values))}")
    return found


def labels(runs: Sequence[Run], titles: Mapping[str, str]) -> list[str]:
    """Short and different names: the model, then its method, then its folder."""
    names = [
        titles.get(run.registered or "") or run.registered or short_model_name(run.model)
        for run in runs
    ]
    for extra in (lambda run: run.method, lambda run: run.folder.name, lambda run: run.folder):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            f"{name}, {extra(run)}" if name in twice else name
            for name, run in zip(names, runs, strict=True)
        ]
    return names


def short_model_name(model: str) -> str:
    """The last part of a path or hub id, with the one before it where it says little alone."""
    path = Path(model.rstrip("/") or model)
    if path.suffix in (".pt", ".bin", ".safetensors") and path.parent.name:
        path = path.parent
    if re.fullmatch(
        r"(?i)direct|channel|flipped|hf|export(ed)?|model|final|(checkpoint.*)", path.name
    ):
        return f"{path.parent.name}/{path.name}".lstrip("/")
    return path.name
