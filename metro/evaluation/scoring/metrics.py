"""Metrics of one prompt: accuracy, macro-F1, the accuracy of guessing.

Macro-F1 is scikit-learn's ``f1_score(..., average="macro", zero_division=0)``, in five lines so
that an evaluation needs no further package.
"""

from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from metro.evaluation.tasks.examples import EvaluationExample


class Metrics(NamedTuple):
    """Metrics of one prompt; all but the last are fractions."""

    accuracy: float
    macro_f1: float | None
    """Mean F1 over the classes present in labels or predictions; 0 where undefined (as
    scikit-learn's ``zero_division=0``); None for minimal pairs, which have no classes."""
    chance: float
    """Expected accuracy of drawing one of the distinct answer choices."""
    median_choices: float


def measure(examples: Sequence[EvaluationExample], predictions: Sequence[int]) -> Metrics:
    """Compute the metrics of predictions; duplicate answer choices count as the first of them."""
    truths = [true_choice(example) for example in examples]
    guesses = [first_equal(e, p) for e, p in zip(examples, predictions, strict=True)]
    sizes = [example.num_distinct_choices for example in examples]
    return Metrics(
        accuracy=fmean(t == g for t, g in zip(truths, guesses, strict=True)),
        macro_f1=macro_f1(truths, guesses),
        chance=sum(1 / size for size in sizes) / len(sizes),
        median_choices=float(median(sizes)),
    )


def first_equal(example: EvaluationExample, index: int) -> int:
    """Index of the first answer choice with the text of this one."""
    return list(example.choices).index(example.choices[index])


def true_choice(example: EvaluationExample) -> int:
    """Index of the first answer choice that is correct."""
    return first_equal(example, example.label)


def macro_f1(truths: Sequence[int], guesses: Sequence[int]) -> float:
    """Average the F1 of every class that occurs, without weights."""
    scores = []
    for c in sorted({*truths, *guesses}):
        hits = sum(t == g == c for t, g in zip(truths, guesses, strict=True))
        scores.append(2 * hits / (truths.count(c) + guesses.count(c)))
    return sum(scores) / len(scores)
