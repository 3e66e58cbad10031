"""Metrics. Oracles: by hand, and scikit-learn's macro-F1 where it is installed."""

import random

import pytest

from metro.evaluation.scoring.metrics import macro_f1, measure
from metro.evaluation.tasks.examples import EvaluationExample


def test_metrics_by_hand():
    """Oracle: by hand. Equal options are one: predicting either is right, chance is 1/2."""
    examples = [
        EvaluationExample(0, "", ["a", "b"], 0),
        EvaluationExample(1, "", ["a", "b", "b"], 2),
        EvaluationExample(2, "", ["a", "b", "c", "d"], 3),
    ]
    metrics = measure(examples, [0, 1, 0])
    assert metrics.accuracy == pytest.approx(2 / 3)
    assert metrics.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert metrics.median_choices == 2
    # classes 0: 2*1/(1+2), 1: 2*1/(1+1), 3: 0/(1+0)
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_macro_f1_equals_scikit_learn():
    """Oracle: scikit-learn."""
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    for size in (2, 3, 5):
        truths, guesses = ([draw.randrange(size) for _ in range(50)] for _ in range(2))
        expected = metrics.f1_score(truths, guesses, average="macro")
        assert macro_f1(truths, guesses) == pytest.approx(expected)
