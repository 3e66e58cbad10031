"""Statistics of a run: each task over its prompts, and the average of the suite.

A task's accuracy is the mean over its prompts; the average is the mean over tasks, the three rounds
of ANLI being three tasks, as in the tables of METRO-T0 and FLIPPED. A task that lacks prompts of
its suite is partial: shown, and left out of the average. Of minimal pairs the average is over
paradigms, as published of BLiMP: each counts the same, whatever its phenomenon, and those that were
scored count without the others.

The interval is a percentile bootstrap over *examples*, from the per-example scores: examples are
drawn with replacement, the same draw for all prompts of a task (they ask about the same examples),
and the mean over prompts is computed again. Paradigms have pairs of their own and are drawn one by
one. The interval estimates how far another sample of examples could move the number. How far other
prompts could move it is the spread (standard deviation, quartiles, extremes). In the average tasks
are drawn independently. (``scipy.stats.bootstrap`` draws complete rows: it has no place for a
prompt that applies to a part of the examples.)

Shapes: R resamples, N examples, P prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from metro.evaluation.runs.run_folder import PromptResult, Run
from metro.evaluation.settings import PAIR_METHODS
from metro.utils.files import write_json
from metro.utils.messages import UserError, counted, percent, shortened
from metro.utils.table import Table

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 2_000_000
"""Resamples x examples held in memory."""


@dataclass
class TaskSummary:
    """Statistics of one task over its prompts; all but counts and seconds are fractions."""

    task: str
    num_prompts: int
    num_listed: int
    """Prompts that the suite lists for this task."""
    num_examples: int
    """Of the prompt with the most examples."""
    mean: float
    median: float
    std: float
    """Population standard deviation over prompts, as numpy.std."""
    lowest: float
    highest: float
    quartiles: tuple[float, float]
    """25th and 75th percentile over prompts; their difference is the IQR."""
    interval: tuple[float, float] | None
    """Bootstrap interval of the mean; None without per-example scores."""
    chance: float | None
    """Expected accuracy of guessing, mean over prompts."""
    macro_f1: float | None
    """Mean over prompts."""
    seconds: float | None
    accuracies: dict[str, float] = field(default_factory=dict)
    """Prompt -> accuracy."""
    macro_f1s: dict[str, float] = field(default_factory=dict)
    """Prompt -> macro-F1, of the prompts that have one."""

    @property
    def complete(self) -> bool:
        return self.num_prompts >= self.num_listed


@dataclass
class Summary:
    """Statistics of a run."""

    model: str
    method: str
    suite: str
    tasks: dict[str, TaskSummary]
    """Tasks with a result, partial ones too, in the order of the suite."""
    missing: list[str]
    """Tasks of the suite without a result."""
    num_listed: int
    """Prompts that the suite lists."""
    averaged: list[str]
    """Tasks with a part in the average: complete ones, of minimal pairs all."""
    average: float | None
    """Mean of the complete tasks' means, None where no task is complete; of minimal pairs the mean
    of all paradigms."""
    average_interval: tuple[float, float] | None
    average_chance: float | None
    average_macro_f1: float | None
    seconds: float | None
    limit: int | None = None
    """Examples per prompt that the run was limited to."""
    confidence: float = CONFIDENCE
    num_resamples: int = NUM_RESAMPLES
    question: str | None = None
    """What the decoder was asked, of minimal pairs."""

    @property
    def is_of_pairs(self) -> bool:
        """True of minimal pairs, whose prompts are paradigms."""
        return self.method in PAIR_METHODS

    @property
    def num_averaged(self) -> int:
        """Tasks that the average is over, of minimal pairs paradigms."""
        if self.is_of_pairs:
            return sum(task.num_prompts for task in self.tasks.values())
        return len(self.averaged)

    @property
    def complete(self) -> bool:
        """True where the average is over the whole suite."""
        return not self.missing and all(task.complete for task in self.tasks.values())

    @property
    def notes(self) -> list[str]:
        """Remarks that a reader needs before using the numbers."""
        found = []
        if self.is_of_pairs:
            asked = f" ({self.question})" if self.question else ""
            found.append(f"minimal pairs, scored by {self.method}{asked}")
        partial = [
            f"{task.task} ({task.num_prompts} of {task.num_listed} prompts)"
            for name, task in self.tasks.items()
            if name not in self.averaged
        ]
        if partial:
            found.append(f"partial, not in the average: {shortened(partial)}")
        if self.missing:
            found.append(f"without results, not in the average: {shortened(self.missing)}")
        if self.limit is not None:
            found.append(
                f"limited to {self.limit} examples per prompt: not comparable with numbers over "
                "all examples"
            )
        return found

    @property
    def average_title(self) -> str:
        """What the average is over."""
        if self.is_of_pairs:
            part = "" if self.complete else f"{self.num_averaged} of "
            return f"mean of {part}{counted(self.num_listed, 'paradigm')}"
        return "average" if self.complete else f"average of {self.num_averaged}"

    def table(self) -> Table:
        """Tasks in rows, numbers in percent, the average last."""
        rows = []
        for task in self.tasks.values():
            prompts = str(task.num_prompts)
            prompts = prompts if task.complete else f"{prompts} of {task.num_listed}"
            spread = (task.lowest, task.highest) if task.num_prompts > 1 else None
            intervals = [interval_text(spread), interval_text(task.interval)]
            first, last = (task.mean, task.median), (task.macro_f1, task.chance)
            rows.append([task.task, prompts, *map(percent, first), *intervals, *map(percent, last)])
        if self.average is not None:
            interval = interval_text(self.average_interval)
            start = [self.average_title, "", percent(self.average), "", "", interval]
            last = (self.average_macro_f1, self.average_chance)
            rows.append([*start, *map(percent, last)])
        unit = "paradigms" if self.is_of_pairs else "prompts"
        header = ["task", unit, "mean", "median", "spread", "interval", "F1", "chance"]
        return Table(header, rows, notes=self.notes)


def summarize(run: Run, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Summary:
    """Summarize a run, finished or not.

    Args:
        run: see :func:`metro.evaluation.runs.run_folder.read_run`.
        num_resamples: of the bootstrap; 0 omits the intervals.
        seed: of the bootstrap. The same run and seed give the same intervals.

    Raises:
        UserError: a score file contradicts results.jsonl.
    """
    by_task = run.by_task()
    is_of_pairs = run.method in PAIR_METHODS
    tasks, resamples = {}, {}
    for name, results in by_task.items():
        # Seeded by task name, so that a task's interval does not depend on what else was run.
        random = np.random.default_rng([seed, *name.encode()])
        means_R = resample_means(run, results, num_resamples, random) if num_resamples else None
        listed = run.tasks.get(name) or [result.prompt for result in results]
        tasks[name] = summarize_task(name, results, len(listed), means_R)
        resamples[name] = means_R
    missing = [name for name in run.tasks if name not in by_task]
    averaged = [name for name, task in tasks.items() if task.complete or is_of_pairs]
    drawn = [means for name in averaged if (means := resamples[name]) is not None]
    weights = [tasks[name].num_prompts if is_of_pairs else 1 for name in averaged]
    mean = partial(np.average, weights=weights)
    return Summary(
        model=run.model,
        method=run.method,
        suite=run.suite,
        tasks=tasks,
        missing=missing,
        num_listed=(
            sum(task.num_listed for task in tasks.values())
            + sum(len(run.tasks[name]) for name in missing)
        ),
        averaged=averaged,
        average=aggregate([tasks[name].mean for name in averaged], mean),
        average_interval=(
            percentile_interval(mean(drawn, axis=0))
            if drawn and len(drawn) == len(averaged)
            else None
        ),
        average_chance=aggregate([tasks[name].chance for name in averaged], mean),
        average_macro_f1=aggregate([tasks[name].macro_f1 for name in averaged], mean),
        seconds=aggregate([task.seconds for task in tasks.values()], np.sum),
        limit=run.options.get("limit"),
        question=run.question,
        num_resamples=num_resamples,
    )


def summarize_task(
    name: str, results: list[PromptResult], num_listed: int, means_R: np.ndarray | None
) -> TaskSummary:
    accuracies = np.array([result.accuracy for result in results])
    low, high = np.percentile(accuracies, [25, 75])
    return TaskSummary(
        task=name,
        num_prompts=len(results),
        num_listed=num_listed,
        num_examples=max(result.num_examples for result in results),
        mean=float(accuracies.mean()),
        median=float(np.median(accuracies)),
        std=float(accuracies.std()),
        lowest=float(accuracies.min()),
        highest=float(accuracies.max()),
        quartiles=(float(low), float(high)),
        interval=None if means_R is None else percentile_interval(means_R),
        chance=aggregate([result.chance for result in results]),
        macro_f1=aggregate([result.macro_f1 for result in results]),
        seconds=aggregate([result.seconds for result in results], np.sum),
        accuracies={result.prompt: result.accuracy for result in results},
        macro_f1s={r.prompt: r.macro_f1 for r in results if r.macro_f1 is not None},
    )


def resample_means(
    run: Run, results: list[PromptResult], num_resamples: int, random: np.random.Generator
) -> np.ndarray | None:
    """Draw (R,) means over prompts; None if scores are missing."""
    right_PN = [rights(run, result) for result in results]
    found_PN = [right for right in right_PN if right is not None]
    if len(found_PN) < len(right_PN):
        return None
    is_of_pairs = run.method in PAIR_METHODS
    if not (all(found_PN) if is_of_pairs else any(found_PN)):
        return None
    if is_of_pairs:
        drawn = [draw_apart([*right.values()], num_resamples, random) for right in found_PN]
        return np.mean(drawn, axis=0)
    return np.nanmean(draw_together(found_PN, num_resamples, random), axis=1)


def rights(run: Run, result: PromptResult) -> dict[int, float] | None:
    """Read which examples of a prompt were right: index -> 0 to 1; None if scores are missing."""
    scores = run.scores(result)
    if scores is None or result.scores_file is None:
        return None
    right = {score.index: score.right for score in scores}
    accuracy = sum(right.values()) / max(1, len(right))
    if len(right) != result.num_examples or abs(accuracy - result.accuracy) > 1e-3:
        raise UserError(
            f"{run.folder / result.scores_file} has {len(right)} examples with accuracy "
            f"{accuracy:.4f}, results.jsonl says {result.num_examples} with "
            f"{result.accuracy:.4f}: delete both and evaluate again"
        )
    return right


def draw_apart(
    right_N: Sequence[float], num_resamples: int, random: np.random.Generator
) -> np.ndarray:
    """Draw (R,) accuracies of a prompt by itself: how often each of its few values is drawn."""
    values, counts = np.unique(right_N, return_counts=True)
    num = len(right_N)
    return random.multinomial(num, counts / num, num_resamples) @ values / num


def draw_together(
    right_PN: Sequence[Mapping[int, float]], num_resamples: int, random: np.random.Generator
) -> np.ndarray:
    """Draw (R, P) accuracies of prompts that ask about the same examples."""
    indices = sorted(set().union(*right_PN))
    # Not every prompt has every example: some templates apply to a part of the dataset.
    present_NP = np.array([[n in right for right in right_PN] for n in indices], dtype=np.float32)
    right_NP = np.array(
        [[right.get(n, 0.0) for right in right_PN] for n in indices], dtype=np.float32
    )
    parts, missing = [], num_resamples
    while missing:
        drawn = min(missing, max(1, DRAWN_AT_ONCE // len(indices)))
        picked = random.integers(len(indices), size=(drawn, len(indices)))
        picked += np.arange(drawn)[:, None] * len(indices)
        counts = np.bincount(picked.ravel(), minlength=picked.size).reshape(picked.shape)
        weight_RN = counts.astype(np.float32)
        num_right = (weight_RN @ right_NP).astype(np.float64)
        num = (weight_RN @ present_NP).astype(np.float64)
        # A prompt that was drawn no example of has no accuracy in that resample.
        parts.append(np.divide(num_right, num, where=num > 0, out=np.full_like(num, np.nan)))
        missing -= drawn
    return np.concatenate(parts)


def percentile_interval(values_R: np.ndarray) -> tuple[float, float]:
    outside = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values_R, [outside, 100 - outside])
    return float(low), float(high)


def aggregate(values: Sequence[float | None], function=np.mean) -> float | None:
    """Mean, None if a value is missing: a mean over the values present would mislead."""
    present = [value for value in values if value is not None]
    return float(function(present)) if present and len(present) == len(values) else None


def write_summary(summary: Summary, path: Path) -> None:
    """Write a summary as JSON, completely or not at all."""
    content = asdict(summary)
    for name, task in summary.tasks.items():
        content["tasks"][name]["complete"] = task.complete
    write_json(path, {**content, "complete": summary.complete})


def interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{percent(interval[0], 1)}–{percent(interval[1], 1)}"
