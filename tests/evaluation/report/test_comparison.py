"""Runs beside published rows: values, averages, labels, notes.

Oracles: numbers worked out by hand from the runs written here and from `checkpoints/registry.yaml`.
"""

import dataclasses

import pytest

from metro.evaluation.report.build import average
from metro.evaluation.report.comparison import compare
from metro.evaluation.report.figure import drawings
from metro.evaluation.report.naming import path_title
from metro.evaluation.report.page import page
from metro.evaluation.report.tables import average_cell
from metro.evaluation.runs.published import PublishedRow, published_rows
from metro.evaluation.runs.run_folder import PromptResult, Run, read_run
from tests.evaluation.run_folders import PROMPTS, PUBLISHED, write_run


def test_rows_are_those_worked_out_by_hand(section):
    """Oracle: 0.59 - 0.6162 = -0.0262, 0.47 - 0.5274 = -0.0574; averages are means of the tasks."""
    first, difference, second, card, paper, other, chance = section.rows
    kinds = [row.kind for row in section.rows]
    assert kinds == ["run", "difference", "run", *["published"] * 3, "chance"]
    assert first.label == "METRO-T0-Base"
    assert first.values == pytest.approx({"rte": 0.59, "cb": 0.47})
    assert first.average == pytest.approx(0.53)
    assert difference.detail == "card"
    assert difference.values == pytest.approx({"rte": -0.0262, "cb": -0.0574})
    assert difference.average == pytest.approx(-0.0418)
    assert second.label == "mine/checkpoint_last"
    assert second.partial == {"rte"} and second.values["rte"] == 0.7
    assert (second.average, second.num_averaged) == (0.5, 1)
    assert card.average == pytest.approx((0.6162 + 0.5274) / 2)
    assert card.compared and not paper.compared
    assert other.average is None  # it has no number for cb
    assert chance.values == {"rte": 0.5, "cb": 0.5}


def test_a_partial_task_is_never_the_best(section):
    """Oracle: 0.7 of one prompt against 0.59 of ten; 0.5 against 0.47."""
    first, _, second = section.rows[:3]
    assert first.best == {"rte"}
    assert second.best == {"cb"}  # averages are over different tasks: none is best


def test_difference_averages_over_tasks_that_both_have(tmp_path):
    """Oracle: by hand, cb is not published, so the average difference is that of rte."""
    run = read_run(write_run(tmp_path / "run", PROMPTS, registered="t0_3b"))
    (section,) = compare([run], PUBLISHED)
    difference = section.rows[1]
    assert difference.values == pytest.approx({"rte": 0.59 - 0.6455})
    assert (difference.average, difference.num_averaged) == (difference.values["rte"], 1)


def test_averages_of_published_rows_are_over_the_tasks_shown(tmp_path):
    """Oracle: by hand; a note says that the suite has more tasks."""
    run = read_run(
        write_run(tmp_path / "run", {"cb": {"a": 0.5}}, listed={"cb": ["a"], "rte": ["a"]})
    )
    (section,) = compare([run], PUBLISHED)
    assert section.tasks == ["cb"]
    assert section.rows[1].average == 0.5274
    assert any("over the 1 task shown; the suite lists 2" in note for note in section.notes)


def test_suites_make_sections_that_do_not_mix(tmp_path):
    """Oracle: two suites given in turns."""
    runs = [
        read_run(write_run(tmp_path / name, {task: {"p": 0.5}}, suite=suite))
        for name, suite, task in [
            ("a", "t0", "rte"),
            ("b", "bigbench", "winowhy"),
            ("c", "t0", "cb"),
        ]
    ]
    sections = compare(runs, PUBLISHED)
    assert [section.suite for section in sections] == ["t0", "bigbench"]
    assert sections[0].tasks == ["rte", "cb"] and sections[1].tasks == ["winowhy"]
    assert [row.suite for row in sections[1].published] == ["bigbench"]


def test_suites_of_a_user_are_called_what_they_call_themselves(tmp_path):
    """Oracle: the title in run.json; without one the name, and the papers' suites as they are."""
    for suite, title, shown in [
        ("colours", "Colours, named", "Colours, named"),
        ("my_quiz", None, "My quiz"),
        ("t0", "else", "T0 Eval"),
    ]:
        folder = write_run(tmp_path / suite, {"a": {"p": 0.5}}, suite=suite, title=title)
        (section,) = compare([read_run(folder)])
        assert section.title == shown


def test_label_generalisation_shows_macro_f1(tmp_path):
    """Oracle: the paper's metric; the runs written here have a macro-F1 of half the accuracy."""
    folder = write_run(tmp_path / "run", {"cb": {"a": 0.5}}, suite="label_generalization")
    (section,) = compare([read_run(folder)])
    assert section.rows[0].values == {"cb": 0.25}
    assert [row.kind for row in section.rows] == ["run"]  # nobody states a chance of macro-F1
    assert "Macro-F1" in page("x", [section])


def test_labels_and_colours_tell_runs_apart(tmp_path):
    """Oracle: by hand: model, then method where the report has several of it, then folder; a model
    and method keep their colour from section to section."""

    def run(folder, model, method="direct", suite="t0", registered=None):
        results = [PromptResult(suite, "rte", "p", method, 10, 0.5)]
        return Run(tmp_path / folder, model, method, suite, registered, results=results)

    def labels(*runs):
        sections = compare(runs, (), {"m": "Model M"})
        return [[(each.label, each.colour) for each in section.runs] for section in sections]

    assert labels(run("a", "x/one"), run("b", "two")) == [[("one", 0), ("two", 1)]]
    assert labels(run("a", "x/one"), run("b", "x/one", "flipped"), run("c", "two")) == [
        [("one, direct", 0), ("one, flipped", 1), ("two", 2)]
    ]
    assert labels(run("a", "x"), run("b", "two", suite="mmlu"), run("c", "x", suite="mmlu")) == [
        [("x", 0)],
        [("two", 1), ("x", 0)],
    ]
    assert labels(run("a", "one"), run("b", "one")) == [[("one, a", 0), ("one, b", 1)]]
    assert labels(run("a", "hub", registered="m")) == [[("Model M", 0)]]
    assert path_title("runs/mine/checkpoint_last.pt") == "mine/checkpoint_last"
    assert path_title("runs/mine/small.pt") == "small"
    assert path_title("runs/mine/pytorch_model.bin") == "mine"
    assert path_title("runs/mine/direct/") == "mine/direct"
    assert path_title("google/t5-small") == "t5-small"


def test_checkpoints_of_one_folder_are_called_by_their_files(tmp_path):
    """Oracle: by hand; two checkpoints, one with two methods; then one of the same name elsewhere,
    which has all runs of that name say their folders."""
    runs = [
        Run(tmp_path / name, model, method, "blimp", results=[result])
        for name, model, method in [
            ("a", "golden/checkpoints/metro_a.pt", "decoder"),
            ("b", "golden/checkpoints/metro_a.pt", "rtd"),
            ("c", "golden/checkpoints/t5_c.pt", "decoder"),
            ("d", "other/metro_a.pt", "decoder"),
        ]
        for result in [PromptResult("blimp", "binding", "p", method, 10, 0.5)]
    ]
    (section,) = compare(runs[:3])
    assert [run.label for run in section.runs] == ["metro_a, decoder", "metro_a, rtd", "t5_c"]
    (section,) = compare(runs)
    assert [run.label for run in section.runs] == [
        "metro_a, decoder, a",
        "metro_a, rtd, b",
        "t5_c",
        "metro_a, decoder, d",
    ]


def test_averages_of_minimal_pairs_are_over_paradigms(tmp_path):
    """Oracle: by hand, (0.9 + 0.3 + 0.6) / of 3 of 4; published phenomena have none."""
    accuracies = {"binding": {"a": 0.9}, "ellipsis": {"c": 0.3, "d": 0.6}}
    listed = {"binding": ["a", "b"], "ellipsis": ["c", "d"]}
    folder = write_run(
        tmp_path / "run", accuracies, suite="blimp", method="decoder", listed=listed, registered="m"
    )
    published = [PublishedRow("m", "M", "blimp", "paper", {"binding": 0.8, "ellipsis": 0.7})]
    (section,) = compare([read_run(folder)], published)
    run, difference, paper, chance = section.rows
    assert run.average == pytest.approx(0.6) and run.partial == {"binding"}
    assert difference.average is None and paper.average is None
    averages = [average_cell(row, section) for row in section.rows]
    assert averages == ["60.00 (3 of 4)", "", "", "50.00"]
    text = page("x", [section])
    assert "averaged over 4 paradigms." in text and "over 3 of 4 paradigms" in text
    assert "† a part of the paradigms<" in text and "of each paradigm apart" in text
    assert average(section, run) == "60.00, over 3 of 4 paradigms"


def test_a_model_is_compared_with_rows_of_its_method_only(tmp_path):
    """Oracle: flipped_3b is published by method flipped; evaluated directly it is another thing."""
    rows = published_rows(["flipped_3b"])
    for method, compared in [("flipped", True), ("direct", False)]:
        folder = write_run(
            tmp_path / method, {"rte": {"p": 0.5}}, method=method, registered="flipped_3b"
        )
        (section,) = compare([read_run(folder)], rows)
        assert ("difference" in [row.kind for row in section.rows]) == compared


def test_what_is_true_of_all_runs_is_said_once(tmp_path):
    """Oracle: by hand: both limited, one partial."""
    both = {"options": {"limit": 8}}
    one = write_run(tmp_path / "one", {"rte": {"a": 0.5}}, model="one", **both)
    two = write_run(
        tmp_path / "two", {"rte": {"a": 0.5}}, model="two", listed={"rte": ["a", "b"]}, **both
    )
    (section,) = compare([read_run(one), read_run(two)])
    assert len([note for note in section.notes if note.startswith("limited to 8")]) == 1
    assert any(note.startswith("two: partial, ") for note in section.notes)


def test_options_that_runs_differ_in_are_named(tmp_path):
    """Oracle: by hand: one option differs; limits are said of each run."""
    runs = [
        read_run(write_run(tmp_path / str(number), {"rte": {"a": 0.5}}, options=options))
        for number, options in enumerate(
            [
                {"label_words": "words", "split": None, "limit": 8, "dtype": "float32"},
                {"label_words": "words", "split": "test", "limit": None, "dtype": "float32"},
            ]
        )
    ]
    (section,) = compare(runs)
    assert [n for n in section.notes if "differ" in n] == ["runs differ in --split: default, test"]


def test_runs_of_other_limits_are_marked_and_never_the_best(tmp_path):
    """Oracle: by hand: 0.9 of 5 examples beside 0.5 and 0.6 of all, then beside 0.5 of 20."""
    options = [{"limit": 5}, {"limit": None}, {}, {"limit": 20}]
    runs = [
        read_run(
            write_run(
                tmp_path / str(number), {"rte": {"a": value, "b": value}}, model=f"m{number}",
                options=options[number], num_examples=options[number].get("limit") or 277,
            )
        )
        for number, value in enumerate((0.9, 0.5, 0.6, 0.5))
    ]  # fmt: skip
    (section,) = compare(runs[:3])
    assert [run.label for run in section.runs] == ["m0, limit 5", "m1", "m2"]
    assert [row.best for row in section.rows[:3]] == [set(), set(), {"rte", "average"}]
    assert "2 prompts · 5 / 277 / 277 examples" in "".join(drawings(section))
    (section,) = compare([runs[0], runs[3]])
    assert [run.label for run in section.runs] == ["m0, limit 5", "m3, limit 20"]
    assert not any(row.best for row in section.rows)
    (section,) = compare([runs[0], dataclasses.replace(runs[3], options={"limit": 5})])
    assert [run.label for run in section.runs] == ["m0", "m3"]
    assert section.rows[0].best == {"rte", "average"}
