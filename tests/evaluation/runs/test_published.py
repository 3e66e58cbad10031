"""Published rows out of the registry.

Oracles: the registry's own numbers; rows small enough to merge by hand.
"""

import pytest

from metro.evaluation.runs.published import PublishedRow, merge_agreeing, published_rows
from metro.models.registry import registered_models


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
    with pytest.raises(ValueError, match="all and none stand alone"):
        published_rows(["all", "t0_3b"])
