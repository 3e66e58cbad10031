"""Published numbers out of the registry, for the report and for ``--check-published``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from metro.evaluation.runs.summary import Summary
from metro.models.registry import RegisteredModel, registered_model, registered_models
from metro.utils.messages import UserError, counted

ROUNDING = 0.0002
"""Two sources agree where they differ by less (fraction)."""


@dataclass(frozen=True)
class PublishedRow:
    """A published line of numbers."""

    model: str
    """Name in the registry."""
    title: str
    suite: str
    source: str
    values: dict[str, float]
    """Task -> fraction."""
    method: str = ""
    """Method of its evaluation; empty where any method may be compared with it."""


def published_rows(selection: Sequence[str] = ("all",)) -> list[PublishedRow]:
    """Rows in the order of the registry, the one that a checkpoint is compared with first.

    Args:
        selection: ``all``, ``none``, or names of registered models (hub ids too).

    Raises:
        UserError: a name is unknown, or stands beside ``all`` or ``none``.
    """
    names = [name for item in selection for name in item.split(",") if name]
    if "none" in names or "all" in names:
        if len(names) > 1:
            raise UserError(f"--published {' '.join(names)}: give all or none alone")
        models = list(registered_models().values()) if names == ["all"] else []
    else:
        models = list({model.name: model for model in map(registered_model, names)}.values())
    return [row for model in models for row in rows_of(model)]


def rows_of(model: RegisteredModel) -> list[PublishedRow]:
    """Published rows of a model; it is compared with the first one of a suite."""
    return merge_agreeing(
        [
            PublishedRow(
                model.name,
                model.title,
                table["suite"],
                table["source"],
                {task: accuracy / 100 for task, accuracy in table["results"].items()},
                model.method,
            )
            for table in model.published
        ]
    )


def merge_agreeing(rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    """Drop those rows of one model that another row of the suite repeats.

    A card often holds a part of a paper's table. The fuller row is kept then, in the position of
    the first and with both sources, so that a checkpoint is compared with all its known numbers.
    """
    kept: list[PublishedRow] = []
    for row in rows:
        for position, other in enumerate(kept):
            fewer, more = sorted((row, other), key=lambda each: len(each.values))
            if row.suite == other.suite and all(
                task in more.values and abs(value - more.values[task]) <= ROUNDING
                for task, value in fewer.values.items()
            ):
                kept[position] = replace(more, source=f"{other.source}; {row.source}")
                break
        else:
            kept.append(row)
    return kept


class PublishedCheck(NamedTuple):
    """Result of a comparison with published numbers."""

    table: str
    """Measured and published accuracy of every task, and the verdict."""
    failure: str | None
    """The tasks that miss their numbers; None if there are none."""


def published_values(model: RegisteredModel, suite: str, method: str) -> dict[str, float]:
    """Published accuracy of every task of a suite, the numbers that the report compares with.

    Raises:
        UserError: there are none for this suite and method.
    """
    if method != model.method:
        raise UserError(
            f"{model.name} was published with method {model.method}, the run uses {method}: leave "
            "--method out to check its numbers"
        )
    rows = rows_of(model)
    for row in rows:
        if row.suite == suite:
            return row.values
    suites = ", ".join(sorted({row.suite for row in rows})) or "none"
    raise UserError(f"no numbers of {model.name} on suite {suite} are registered; it has {suites}")


def check_published(summary: Summary, model: RegisteredModel, tolerance: float) -> PublishedCheck:
    """Compare the tasks that were evaluated in full and have a published number.

    A task misses its number if it is more than ``tolerance`` percentage points away from it, in
    either direction. The verdict names the tasks with a published number that were not compared.

    Raises:
        UserError: the run differs from the one that the numbers were published for.
    """
    if summary.limit is not None:
        raise UserError(
            f"the run used {summary.limit} rows per task, published numbers use all: leave --limit "
            "out to check them"
        )
    published = published_values(model, summary.suite, summary.method)
    tasks = [task for name, task in summary.tasks.items() if name in published and task.complete]
    if not tasks:
        failure = f"no task of {model.name} that has a published number was run in full"
        return PublishedCheck("", failure)
    lines, missed = [], []
    for task in tasks:
        other = published[task.task]
        points = 100 * (task.mean - other)
        lines.append(
            f"{task.task:40} {100 * task.mean:7.2f} published {100 * other:7.2f}  {points:+.2f}"
        )
        if abs(points) > tolerance:
            missed.append(f"{task.task} {points:+.2f}")
    unchecked = [name for name in published if name not in {task.task for task in tasks}]
    rest = f"; not checked: {', '.join(unchecked)}" if unchecked else ""
    if missed:
        failure = (
            f"{model.name} misses its published accuracy by more than {tolerance} points on "
            f"{len(missed)} of {counted(len(tasks), 'task')}: {', '.join(missed)}{rest}"
        )
        return PublishedCheck("\n".join(lines), failure)
    which = counted(len(tasks), "checked task") if unchecked else f"all {len(tasks)}"
    lines.append(f"{which} within {tolerance} points of the published accuracy{rest}")
    return PublishedCheck("\n".join(lines), None)
