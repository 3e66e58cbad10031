"""Published rows out of the registry, and measured numbers beside them.

Oracles: the registry's own numbers; rows small enough to merge by hand; a run of known accuracies
and a model registered with others.
"""

import dataclasses

import pytest

from metro.evaluation.runs.published import (
    PublishedRow,
    check_published,
    merge_agreeing,
    published_rows,
    published_values,
)
from metro.evaluation.runs.run_folder import read_run
from metro.evaluation.runs.summary import summarize
from metro.models.registry import RegisteredModel, registered_models
from tests.evaluation.run_folders import write_run


def test_all_published_rows_of_the_registry_are_shown():
    """Oracle: the registry; every number of it is in the row of its model."""
    rows = published_rows(["all"])
    for model in registered_models().values():
        for table in model.published:
            for task, accuracy in table["results"].items():
                assert any(
                    row.model == model.name
                    and row.suite == table["suite"]
                    and table["source"] in row.source
                    and abs(row.values.get(task, 9) - accuracy / 100) < 0.00021
                    for row in rows
                ), (model.name, table["source"], task)


def test_the_card_of_a_base_model_comes_before_the_table_it_differs_from():
    """Oracle: metro_t0_base, 61.62 on its card and 65.18 in the paper; base++ agrees in both."""
    base = [row for row in published_rows(["metro_t0_base"]) if row.suite == "t0"]
    assert [row.values["rte"] for row in base] == [0.6162, 0.6518]
    (basepp,) = published_rows(["metro_t0_basepp"])
    assert len(basepp.values) == 11 and basepp.source.startswith("model card")


def test_a_row_within_another_is_merged_into_it():
    """Oracle: by hand."""
    few = PublishedRow("m", "M", "t0", "card", {"rte": 0.5})
    more = PublishedRow("m", "M", "t0", "paper", {"rte": 0.5001, "cb": 0.4})
    (merged,) = merge_agreeing([few, more])
    assert merged.values == more.values and merged.source == "card; paper"
    other = PublishedRow("m", "M", "t0", "paper", {"rte": 0.51, "cb": 0.4})
    assert merge_agreeing([few, other]) == [few, other]
    elsewhere = PublishedRow("m", "M", "mmlu", "paper", {"rte": 0.5})
    assert merge_agreeing([few, elsewhere]) == [few, elsewhere]


def test_published_rows_are_selected_by_name():
    """Oracle: the names given; hub ids and commas work, a wrong name gets the nearest."""
    assert published_rows(["none"]) == []
    named = published_rows(["t0_3b,flipped_3b"])
    assert {row.model for row in named} == {"t0_3b", "flipped_3b"}
    assert {row.model for row in published_rows(["bigscience/T0"])} == {"t0_11b"}
    with pytest.raises(ValueError, match="metro_t0_base"):
        published_rows(["metro_t0_bsae"])
    with pytest.raises(ValueError, match="give all or none alone"):
        published_rows(["all", "t0_3b"])


def registered(method: str = "direct", suite: str = "t0", **results) -> RegisteredModel:
    return RegisteredModel(
        name="toy_base", title="Toy", hub_id="a/toy", family="metro", parameters=1, config={},
        vocabulary="", pretraining="", finetuning="", method=method, paper="", licence="mit",
        published=({"suite": suite, "source": "card", "results": results},),
    )  # fmt: skip


@pytest.fixture
def summary(tmp_path):
    accuracies = {"rte": {"a": 0.6, "b": 0.7}, "cb": {"a": 0.4}, "wsc": {"a": 0.5}}
    listed = {"rte": ["a", "b"], "cb": ["a"], "wsc": ["a", "b"]}
    return summarize(read_run(write_run(tmp_path / "run", accuracies, listed=listed)))


def test_numbers_within_the_tolerance_pass(summary):
    """Oracle: rte is 65 %, cb 40 %; wsc is partial, copa was not run: both are named."""
    check = check_published(summary, registered(rte=65.9, cb=39.2, wsc=99.0, copa=10.0), 1.0)
    assert check.failure is None
    assert check.table.endswith(
        "2 checked tasks within 1.0 points of the published accuracy; not checked: wsc, copa"
    )
    lines = [line.split() for line in check.table.splitlines()]
    assert lines[0] == ["rte", "65.00", "published", "65.90", "-0.90"]
    assert lines[1] == ["cb", "40.00", "published", "39.20", "+0.80"]
    assert len(lines) == 3
    check = check_published(summary, registered(rte=65.9, cb=39.2), 1.0)
    assert check.table.endswith("all 2 within 1.0 points of the published accuracy")


def test_a_missed_number_fails_and_is_named(summary):
    """Oracle: cb is 2.5 points below, rte 3 above: both are misses."""
    check = check_published(summary, registered(rte=65.0, cb=42.5), 1.0)
    assert check.failure.endswith("by more than 1.0 points on 1 of 2 tasks: cb -2.50")
    assert "cb" in check.table and "rte" in check.table
    check = check_published(summary, registered(rte=62.0, cb=42.5), 1.0)
    assert check.failure.endswith("on 2 of 2 tasks: rte +3.00, cb -2.50")
    check = check_published(summary, registered(rte=62.0, copa=10.0), 1.0)
    assert check.failure.endswith("on 1 of 1 task: rte +3.00; not checked: copa")


def test_numbers_are_those_that_the_report_compares_with():
    """Oracle: a card with a part of the paper's table, which agrees with it: the fuller one."""
    tables = (
        {"suite": "t0", "source": "card", "results": {"rte": 65.0}},
        {"suite": "t0", "source": "paper", "results": {"rte": 65.01, "cb": 40.0}},
    )
    model = dataclasses.replace(registered(rte=65.0), published=tables)
    found = published_values(model, "t0", "direct")
    assert found == pytest.approx({"rte": 0.6501, "cb": 0.4})


def test_what_cannot_be_compared_is_refused(summary):
    """Oracle: the message says why."""
    with pytest.raises(ValueError, match="with method flipped, the run uses direct"):
        check_published(summary, registered("flipped", rte=65.0), 1.0)
    with pytest.raises(ValueError, match="on suite t0 are registered; it has mmlu"):
        check_published(summary, registered(suite="mmlu", anatomy=30.0), 1.0)
    check = check_published(summary, registered(copa=30.0), 1.0)
    assert check.failure.startswith("no task of toy_base")
    summary.limit = 10
    with pytest.raises(ValueError, match="leave --limit out"):
        check_published(summary, registered(rte=65.0), 1.0)
