"""Whether a registered model reproduces the numbers that were published for it."""

from typing import NamedTuple

from metro.conversion.registry import RegisteredModel
from metro.evaluation.summary import Summary


class Difference(NamedTuple):
    """One task, in percent."""

    task: str
    measured: float
    published: float

    @property
    def points(self) -> float:
        return self.measured - self.published


def compare_with_published(summary: Summary, model: RegisteredModel) -> list[Difference]:
    """The tasks that were evaluated in full and that numbers were published for.

    Raises:
        ValueError: nothing can be compared; the message says why.
    """
    if summary.limit is not None:
        raise ValueError(
            f"the run used {summary.limit} rows per task, published numbers use all: leave --limit "
            "out to check them"
        )
    if summary.method != model.method:
        raise ValueError(
            f"{model.name} was published with method {model.method}, the run used "
            f"{summary.method}: leave --method out to check its numbers"
        )
    published = model.published_on(summary.suite)
    if not published:
        suites = ", ".join(sorted({table["suite"] for table in model.published})) or "none"
        raise ValueError(
            f"no numbers of {model.name} on suite {summary.suite} are registered; it has {suites}"
        )
    found = [
        Difference(name, 100 * task.mean, published[name])
        for name, task in summary.tasks.items()
        if name in published and task.complete
    ]
    if not found:
        raise ValueError(f"no task of {model.name} that has a published number was run in full")
    return found


def check_published(summary: Summary, model: RegisteredModel, tolerance: float) -> str:
    """A table of the differences.

    Raises:
        ValueError: one is larger than ``tolerance`` percentage points.
    """
    differences = compare_with_published(summary, model)
    lines = [
        f"{d.task:40} {d.measured:7.2f} published {d.published:7.2f}  {d.points:+.2f}"
        for d in differences
    ]
    wrong = [d for d in differences if abs(d.points) > tolerance]
    if wrong:
        worst = ", ".join(f"{d.task} {d.points:+.2f}" for d in wrong)
        raise ValueError(
            f"{model.name} misses its published accuracy by more than {tolerance} points on "
            f"{len(wrong)} of {len(differences)} tasks: {worst}"
        )
    lines.append(f"all {len(differences)} within {tolerance} points of the published accuracy")
    return "\n".join(lines)
