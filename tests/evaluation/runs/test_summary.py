"""Means, spread, intervals and averages of runs, and what is refused.

Oracles: the averages that the METRO-T0 paper prints, cases small enough to check by hand, the
normal approximation of the binomial distribution.
"""

import json
import random
import re
from math import sqrt

import numpy as np
import pytest

from metro.evaluation.runs.run_folder import PromptResult, Run, read_run
from metro.evaluation.runs.summary import draw_apart, percentile_interval, summarize, write_summary
from tests.evaluation.run_folders import write_run

RESULTS = "results.jsonl"
T0_TASKS = "rte cb anli_r1 anli_r2 anli_r3 wsc winogrande copa story_cloze hellaswag wic".split()


def published_table(text: str) -> dict[str, tuple[list[float], float]]:
    """Rows of the METRO-T0 paper's Table 2: eleven accuracies and the printed average."""
    table = text.split("## 4. Results")[1].split("### 4.1")[0]
    rows = {}
    for line in table.splitlines():
        cells = line.strip("| ").split("|")
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", " ".join(cells[1:]))]
        if len(numbers) == 12:
            rows[cells[0].strip()] = numbers[:-1], numbers[-1]
    return rows


def test_average_is_the_one_that_the_paper_prints(testdata, tmp_path):
    """Oracle: column AVG of Table 2. Its inputs are rounded to 0.01, so is its average."""
    rows = published_table((testdata / "published_results.md").read_text())
    assert len(rows) == 22
    for name, (accuracies, average) in rows.items():
        results = [
            PromptResult("t0", task, "p", "direct", 100, accuracy / 100)
            for task, accuracy in zip(T0_TASKS, accuracies, strict=True)
        ]
        run = Run(tmp_path, name, "direct", "t0", results=results)
        assert 100 * summarize(run).average == pytest.approx(average, abs=0.0101), name


def test_spread_over_prompts_as_computed_by_hand(tmp_path):
    """Oracle: 0.5, 0.6, 0.7, 0.9 by hand: mean 0.675, median 0.65, variance 0.021875."""
    prompts = {"a": 0.5, "b": 0.9, "c": 0.6, "d": 0.7}
    task = summarize(read_run(write_run(tmp_path / "run", {"rte": prompts}))).tasks["rte"]
    assert task.mean == pytest.approx(0.675)
    assert task.median == pytest.approx(0.65)
    assert task.std == pytest.approx(sqrt(0.021875))
    assert (task.lowest, task.highest) == (0.5, 0.9)
    assert task.quartiles == pytest.approx((0.575, 0.75))
    assert task.macro_f1 == pytest.approx(0.3375)
    assert task.chance == 0.5
    assert task.num_examples == 20
    assert task.seconds == 2.0
    assert task.interval is None  # no per-example scores


def test_partial_and_missing_tasks_are_shown_and_not_averaged(tmp_path):
    """Oracle: by hand, cb alone is whole, so the average is 0.4."""
    folder = write_run(
        tmp_path / "run",
        {"rte": {"a": 0.9}, "cb": {"a": 0.3, "b": 0.5}},
        listed={"rte": ["a", "b"], "cb": ["a", "b"], "wsc": ["a"]},
    )
    summary = summarize(read_run(folder))
    assert summary.average == pytest.approx(0.4)
    assert summary.averaged == ["cb"]
    assert not summary.tasks["rte"].complete
    assert summary.tasks["rte"].mean == 0.9
    assert summary.missing == ["wsc"]
    assert not summary.complete

    text = str(summary.table())
    assert "1 of 2" in text and "average of 1" in text and "40.00" in text
    assert "partial, not in the average: rte (1 of 2 prompts)" in text
    assert "without results, not in the average: wsc" in text


def test_a_run_with_no_whole_task_has_no_average(tmp_path):
    """Oracle: nothing to average is no number, above all not 0."""
    folder = write_run(tmp_path / "run", {"rte": {"a": 0.9}}, listed={"rte": ["a", "b"]})
    summary = summarize(read_run(folder))
    assert summary.average is None and summary.average_interval is None
    assert "average" not in str(summary.table()).split("note:")[0]


def test_tasks_and_prompts_come_in_the_order_of_the_suite(tmp_path):
    """Oracle: the order written in run.json, against the order in which they finished."""
    folder = write_run(
        tmp_path / "run",
        {"cb": {"y": 0.1, "x": 0.2}, "rte": {"a": 0.5}},
        listed={"rte": ["a"], "cb": ["x", "y"]},
    )
    summary = summarize(read_run(folder))
    assert list(summary.tasks) == ["rte", "cb"]
    assert list(summary.tasks["cb"].accuracies) == ["x", "y"]


def half_right(num: int) -> list[bool]:
    return [i % 10 < 6 for i in range(num)]


def test_interval_is_that_of_a_binomial(tmp_path):
    """Oracle: normal approximation, 0.6 +- 1.96 sqrt(0.6 * 0.4 / 1000)."""
    folder = write_run(tmp_path / "run", {"rte": {"a": half_right(1000)}})
    low, high = summarize(read_run(folder), num_resamples=4000).tasks["rte"].interval
    half = 1.96 * sqrt(0.24 / 1000)
    assert low == pytest.approx(0.6 - half, abs=0.1 * half)
    assert high == pytest.approx(0.6 + half, abs=0.1 * half)


def test_prompts_of_a_task_are_drawn_together(tmp_path):
    """Oracle: two prompts of which one is right where the other is wrong always have mean 0.5;
    twice the same prompt says no more than once."""
    right = half_right(200)
    opposite = write_run(
        tmp_path / "opposite", {"rte": {"a": right, "b": [not item for item in right]}}
    )
    low, high = summarize(read_run(opposite)).tasks["rte"].interval
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)
    once = summarize(read_run(write_run(tmp_path / "once", {"rte": {"a": right}})))
    twice = summarize(read_run(write_run(tmp_path / "twice", {"rte": {"a": right, "b": right}})))
    assert twice.tasks["rte"].interval == pytest.approx(once.tasks["rte"].interval)


def loop_interval(paradigms: list[list[float]], num_resamples: int) -> tuple[float, float]:
    """The bootstrap with plain loops: each paradigm draws from its own pairs."""
    draw = random.Random(7)
    means = []
    for _ in range(num_resamples):
        drawn = [draw.choices(right, k=len(right)) for right in paradigms]
        means.append(sum(sum(right) / len(right) for right in drawn) / len(drawn))
    means.sort()
    return means[round(0.025 * num_resamples)], means[round(0.975 * num_resamples)]


def test_paradigms_are_drawn_apart(tmp_path):
    """Oracle: plain loops; paradigms of other sizes, ties, and two that are right where the other
    is wrong, of which draws together would make a mean without any interval."""
    right = half_right(100)
    paradigms = {
        "binding": {"a": right, "b": [not item for item in right]},
        "ellipsis": {"c": half_right(40), "d": right, "e": [i % 4 == 0 for i in range(60)]},
    }
    run = read_run(write_run(tmp_path / "run", paradigms, suite="blimp", method="decoder"))
    summary = summarize(run, num_resamples=4000)
    found = {name: task.interval for name, task in summary.tasks.items()}
    expected = {name: loop_interval(list(each.values()), 4000) for name, each in paradigms.items()}
    found["all"] = summary.average_interval
    expected["all"] = loop_interval([p for each in paradigms.values() for p in each.values()], 4000)
    ties = [0.0, 0.5, 1.0, 1.0] * 10
    found["ties"] = percentile_interval(draw_apart(ties, 4000, np.random.default_rng(0)))
    expected["ties"] = loop_interval([ties], 4000)
    for name, (low, high) in expected.items():
        assert found[name] == pytest.approx((low, high), abs=0.08 * (high - low)), name


def test_the_mean_of_minimal_pairs_is_over_the_paradigms_that_were_scored(tmp_path):
    """Oracle: by hand, (0.9 + 0.3 + 0.6) / 3 = 0.6 of 3 of 5 paradigms, whatever their phenomena,
    and of all where all were scored; 0.5 is guessing."""
    accuracies = {"binding": {"a": 0.9}, "ellipsis": {"c": 0.3, "d": 0.6}}
    listed = {"binding": ["a", "b"], "ellipsis": ["c", "d"], "quantifiers": ["e"]}
    options = {"suite": "blimp", "method": "decoder"}
    part = read_run(write_run(tmp_path / "part", accuracies, listed=listed, **options))
    whole = read_run(write_run(tmp_path / "whole", accuracies, **options))
    for run, title in (part, "mean of 3 of 5 paradigms"), (whole, "mean of 3 paradigms"):
        summary = summarize(run)
        assert summary.average == pytest.approx(0.6)
        assert (summary.average_chance, summary.num_averaged) == (0.5, 3)
        last = summary.table().rows[-1]
        assert (last[0], last[2], last[-1]) == (title, "60.00", "50.00")
    assert str(summarize(part).table()).count("1 of 2") == 1
    assert summarize(part).notes[1:] == ["without results, not in the average: quantifiers"]


def test_tasks_are_drawn_apart_in_the_average(tmp_path):
    """Oracle: the mean of two independent means has 1 / sqrt(2) of the width of one."""
    right = half_right(1000)
    folder = write_run(tmp_path / "run", {"rte": {"a": right}, "cb": {"a": right}})
    summary = summarize(read_run(folder), num_resamples=4000)
    low, high = summary.tasks["rte"].interval
    average_low, average_high = summary.average_interval
    assert (average_high - average_low) / (high - low) == pytest.approx(1 / sqrt(2), rel=0.08)


def test_intervals_do_not_depend_on_what_else_was_run(tmp_path):
    """Oracle: the same task alone; and the same seed twice, another seed once."""
    right = half_right(1009)
    alone = read_run(write_run(tmp_path / "alone", {"cb": {"a": right}}))
    beside = read_run(write_run(tmp_path / "beside", {"rte": {"a": right}, "cb": {"a": right}}))
    interval = summarize(alone).tasks["cb"].interval
    assert summarize(beside).tasks["cb"].interval == interval
    assert summarize(beside, seed=1).tasks["cb"].interval != interval


def test_prompts_may_have_different_examples(tmp_path):
    """Oracle: a prompt that applies to the first 5 of 50 examples, all right, and one that is wrong
    everywhere: mean 0.5 in every resample that draws one of the five."""
    prompts = {"a": [True] * 5, "b": [False] * 50}
    task = summarize(read_run(write_run(tmp_path / "run", {"rte": prompts}))).tasks["rte"]
    assert task.mean == 0.5
    assert task.interval == pytest.approx((0.5, 0.5))
    assert task.num_examples == 50


def test_scores_of_another_run_are_refused(tmp_path):
    """Oracle: results.jsonl says 12 of 20, the score file 20 of 20."""
    folder = write_run(tmp_path / "run", {"rte": {"a": half_right(20)}})
    scores = folder / "scores" / "rte" / "0.jsonl"
    scores.write_text(scores.read_text().replace('"prediction": 0', '"prediction": 1'))
    with pytest.raises(ValueError, match=r"20 examples with accuracy 1\.0000.*0\.6000.*again"):
        summarize(read_run(folder))
    scores.write_text(scores.read_text().replace('"label"', '"gold"'))
    with pytest.raises(ValueError, match=r"0\.jsonl, line 1: no 'label'"):
        summarize(read_run(folder))


def test_summary_file_holds_the_same_numbers(tmp_path):
    """Oracle: the summary it was written from."""
    folder = write_run(tmp_path / "run", {"rte": {"a": half_right(50)}})
    summary = summarize(read_run(folder))
    write_summary(summary, folder / "summary.json")
    content = json.loads((folder / "summary.json").read_text())
    assert content["average"] == summary.average == 0.6
    assert content["tasks"]["rte"]["complete"] is True
    assert content["tasks"]["rte"]["interval"] == list(summary.tasks["rte"].interval)
    assert not list(folder.glob("*.tmp"))


def test_limited_runs_say_so(tmp_path):
    """Oracle: the option recorded in run.json."""
    folder = write_run(tmp_path / "run", {"rte": {"a": 0.5}}, options={"limit": 8})
    assert "limited to 8 examples per prompt" in str(summarize(read_run(folder)).table())


def test_many_missing_tasks_are_counted(tmp_path):
    """Oracle: 56 of 57 subjects without results: eight names and 48 more."""
    subjects = {f"s{i:02d}": ["p"] for i in range(57)}
    run = read_run(write_run(tmp_path / "run", {"s00": {"p": 0.5}}, listed=subjects))
    (note,) = summarize(run).notes
    assert note.endswith("average: s01, s02, s03, s04, s05, s06, s07, s08 and 48 more")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (RESULTS, lambda t: t + '{"task": "rte"\n', r"results\.jsonl, line 2 is corrupt"),
        (RESULTS, lambda t: t * 2, r"line 2: rte / a is there twice, first in line 1"),
        (RESULTS, lambda t: '{"task": "rte", "accuracy": 0.5}\n', r"jsonl, line 1: .*'suite'"),
        (RESULTS, lambda t: t.replace(": 0.5", ": 50.0"), r"jsonl, line 1: accuracy 50\.0"),
        (RESULTS, lambda t: t.replace('"t0"', '"mmlu"'), r"says suite t0, .* rte / a is of mmlu"),
        ("run.json", lambda t: '{"model": "x"', r"run\.json is not the JSON"),
        ("run.json", lambda t: '{"model": "x"}', r"run\.json is corrupt .*'method'"),
        ("run.json", None, r"is not a run folder: it has no run\.json"),
    ],
)
def test_damaged_run_folders_are_refused_by_file_and_line(tmp_path, file, damage, message):
    """Oracle: the damage done here; every message is one line."""
    path = write_run(tmp_path / "run", {"rte": {"a": 0.5}}) / file
    if damage:
        path.write_text(damage(path.read_text()))
    else:
        path.unlink()
    with pytest.raises(ValueError, match=message) as caught:
        read_run(tmp_path / "run")
    assert "\n" not in str(caught.value)
