"""Whether a registered model reproduces the numbers that were published for it."""

from typing import NamedTuple

from metro.evaluation.runs.published import rows_of
from metro.evaluation.runs.summary import Summary
from metro.models.registry import RegisteredModel
from metro.utils.messages import UserError, counted


class PublishedCheck(NamedTuple):
    """What a comparison found."""

    table: str
    """Measured and published accuracy of every task, and the verdict."""
    failure: str | None
    """The tasks that miss their numbers; None if there is none."""


def published_values(model: RegisteredModel, suite: str, method: str) -> dict[str, float]:
    """Published accuracy of every task of a suite: the numbers that the report compares with.

    Raises:
        ValueError: there are none for this suite and method.
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
    """Compare the tasks that were evaluated in full and that numbers were published for.

    A task misses its number if it is more than ``tolerance`` percentage points away from it, in
    either direction. The verdict names the tasks with a published number that were not compared.

    Raises:
        ValueError: the run is not what numbers were published for.
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
    checked = {task.task for task in tasks}
    unchecked = [name for name in published if name not in checked]
    rest = f"; not checked: {', '.join(unchecked)}" if unchecked else ""
    if not missed:
        whose = counted(len(tasks), "checked task") if unchecked else f"all {len(tasks)}"
        lines.append(f"{whose} within {tolerance} points of the published accuracy{rest}")
        return PublishedCheck("\n".join(lines), None)
    failure = (
        f"{model.name} misses its published accuracy by more than {tolerance} points on "
        f"{len(missed)} of {counted(len(tasks), 'task')}: {', '.join(missed)}{rest}"
    )
    return PublishedCheck("\n".join(lines), failure)
