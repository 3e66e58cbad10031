"""The table of settings: its changes are options, and its numbers those of the runs."""

import dataclasses
import json
import sys

import pytest

import metro
from metro.pretraining.settings import PretrainingSettings
from metro.utils.files import read_json
from metro.utils.messages import UserError
from tests.conftest import ROOT
from tests.data.prepared import random_text

sys.path.insert(0, str(ROOT / "scripts"))
from ablation import (  # noqa: E402
    BASE,
    BEGIN,
    CHANGES,
    END,
    LASTING,
    PAGE,
    RUNS,
    Run,
    text_of,
    work_through,
)

RESULTS = ROOT / "benchmarks/results/ablation"


def test_changes_are_options_that_differ_from_those_of_the_configuration():
    given = {"data": "data", "output_dir": "out"}
    tiny = PretrainingSettings.combine("metro_t5_tiny", given).resolved()
    names = [Run(change, 1).name for change in CHANGES]
    assert len({*names}) == len(CHANGES) and not CHANGES[0]
    base = Run({}, 1).settings(given).resolved()
    assert base == dataclasses.replace(tiny, **BASE)
    for change in CHANGES + LASTING:
        changed = Run(change, 1).settings(given).resolved()
        for name, value in change.items():
            assert getattr(changed, name) == value != getattr(base, name)


def test_the_page_has_the_table_of_the_committed_runs():
    assert BEGIN + text_of(RUNS, RESULTS) + END in PAGE.read_text()
    assert {path.stem for path in RESULTS.iterdir()} == {run.name for run in RUNS}


def test_table_has_means_and_seeds(tmp_path):
    """Oracle: by hand."""
    runs = [Run(change, seed) for change in ({}, {"lr": 0.001}) for seed in (1, 2)]
    runs += [Run({}, 1, 2000)]
    for number, run in enumerate(runs):
        facts = {
            "updates": 400,
            "reference_bits": {"unigram": 8.5, "bigram": 6.25, "trigram": 6.0, "valid_tokens": 9},
            "auxiliary_bits": 7.0 + number, "recall": 20.0 + number, "false_alarms": 4.0,
            "restored": 5.0, "restored_by_bigram": 9.5, "copied": 98.0,
        }  # fmt: skip
        (tmp_path / f"{run.name}.json").write_text(json.dumps(facts))
    text = text_of(runs, tmp_path)
    assert (
        "400 updates of 1,024 tokens" in text
        and "(unigram 8.50, bigram 6.25, trigram 6.00 bits)" in text
    )
    assert "| `metro_t5_tiny` with `rtd_loss_weight=50.0` | 7.50 (7.00, 8.00) |" in text
    assert "| 20.5 (20.0, 21.0) | 4.0 (4.0, 4.0) | 5.0 (5.0, 5.0) | 9.5 (9.5, 9.5) |" in text
    assert "| 11.00 (11.00) | 24.0 (24.0) |" in text.partition("2,000 updates of 1,024")[2]
    assert "| `lr=0.001` | 9.50 (9.00, 10.00) | 22.5 (22.0, 23.0) |" in text
    with pytest.raises(UserError, match="1 of 6 runs are not done, such as dropout-0.1-u400-s1"):
        text_of([*runs, Run({"dropout": 0.1}, 1)], tmp_path)


@pytest.mark.slow
def test_runs_are_measured_once(tmp_path):
    """Oracle: the same number of tokens; what is there already stays."""
    (tmp_path / "text.txt").write_text(random_text(3, 4000))
    metro.prepare_text(
        inputs=[str(tmp_path / "text.txt")],
        out=tmp_path / "data",
        train_vocab=300,
        valid_fraction=0.3,
    )
    changes = ({}, {"max_tokens": 2048}, {"init_token_std": None})
    runs = [Run(change, 1, 2) for change in changes]
    results = tmp_path / "results"
    results.mkdir()
    work_through(runs, results, tmp_path / "data", tmp_path / "out")
    found = [read_json(results / f"{run.name}.json") for run in runs]
    assert [result["updates"] for result in found] == [2, 1, 2]
    assert found[0]["auxiliary_bits"] != found[2]["auxiliary_bits"]
    assert all(0 <= result["copied"] <= 100 for result in found)
    there, gone = (results / f"{run.name}.json" for run in runs[:2])
    there.write_text("{}")
    gone.unlink()
    work_through(runs, results, tmp_path / "data", tmp_path / "out")
    assert read_json(there) == {} and read_json(gone) == found[1]
