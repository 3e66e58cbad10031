"""What is reported of one prompt: accuracy, macro-F1, the level of guessing."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from metro.evaluation.tasks.examples import EvaluationExample


class Metrics(NamedTuple):
    """All but the last as fractions."""

    accuracy: float
    macro_f1: float
    """Mean over the option numbers that occur as truth or prediction, an absent F1 being 0."""
    chance: float
    """Expected accuracy of drawing one of the distinct options."""
    median_choices: float


def measure(examples: Sequence[EvaluationExample], predictions: Sequence[int]) -> Metrics:
    """Metrics of predictions; equal options count as the first of them."""
    truths = [first_alike(example, example.label) for example in examples]
    guesses = [first_alike(e, p) for e, p in zip(examples, predictions, strict=True)]
    right = sum(t == g for t, g in zip(truths, guesses, strict=True))
    sizes = [example.num_distinct_choices for example in examples]
    return Metrics(
        right / len(examples),
        macro_f1(truths, guesses),
        sum(1 / size for size in sizes) / len(sizes),
        float(median(sizes)),
    )


def first_alike(example: EvaluationExample, index: int) -> int:
    """The first option that reads like this one."""
    return list(example.choices).index(example.choices[index])


def macro_f1(truths: Sequence[int], guesses: Sequence[int]) -> float:
    """Unweighted mean of the F1 of every class that occurs."""
    classes = sorted({*truths, *guesses})
    scores = []
    for c in classes:
        hits = sum(t == g == c for t, g in zip(truths, guesses, strict=True))
        scores.append(2 * hits / (truths.count(c) + guesses.count(c)))
    return sum(scores) / len(scores)
