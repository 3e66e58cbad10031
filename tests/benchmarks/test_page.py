"""The page of performance is that of the committed results, and README has no other numbers."""

import re

import pytest

from benchmarks.page import (
    FIGURE,
    PAGE,
    Comparison,
    comparisons,
    read_results,
    render_figure,
    render_page,
)
from tests.conftest import ROOT


def test_page_and_figure_are_those_of_the_committed_results():
    results = read_results()
    assert PAGE.read_text("utf-8") == render_page(results)
    assert FIGURE.read_text("utf-8") == render_figure(comparisons(results))


@pytest.mark.parametrize("subject", ["pretraining", "evaluation", "flipped_training"])
def test_a_changed_result_changes_the_page(subject):
    results = read_results()
    row = results[subject]["rows"][1]
    key = next(key for key, value in row.items() if isinstance(value, float))
    row[key] *= 3
    assert PAGE.read_text("utf-8") != render_page(results)


def test_comparisons_are_ratios_of_what_they_show():
    """Oracle: by hand; FLIPPED's are of processor time, which the speeds are not."""
    for each in comparisons(read_results()):
        tolerance = 0.15 if each.what.startswith("FLIPPED") else 0.01
        assert each.times == pytest.approx(each.ours / each.alternative, rel=tolerance), each.what


@pytest.mark.parametrize(
    "what, times, floor, memory, verdict",
    [
        ("FLIPPED training, METRO-T5", 8.0, 1.5, 1.0, "8 x: reached"),
        ("FLIPPED training, METRO-T5", 5.0, 2.0, 1.0, "not reached: 8 x"),
        ("FLIPPED training, METRO-T5", 5.0, 1.5, 1.0, "not reached: 8 x (beyond the floor)"),
        ("METRO-base pretraining, bf16", 4.0, None, 0.35, "3.5 x, 0.35 of the memory: reached"),
        ("METRO-base pretraining, bf16", 4.0, None, 0.4, "not reached: 0.35 of the memory"),
        ("Hugging Face tokenizer", 3.0, None, None, ""),
    ],
)
def test_a_target_is_judged_beside_the_floor(what, times, floor, memory, verdict):
    """Oracle: by hand; at the floor METRO would be times * floor as fast as the published way."""
    assert Comparison(what, times, 1.0, "x", times, floor, memory).verdict == verdict


def test_readme_has_no_speed_that_the_page_has_not():
    text = (ROOT / "README.md").read_text("utf-8")
    speeds = re.findall(r"(\d[\d.,]*) (?:times (?:as fast|the speed)|tokens/s|x )", text)
    assert set(speeds) <= set(re.findall(r"\d[\d.,]*", PAGE.read_text("utf-8")))
