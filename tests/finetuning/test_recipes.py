"""The recipes from a checkpoint to a table, on real rows and a tiny model, a few updates each.

Oracle: what has to be there at the end; an option that is drawn is right as often as chance says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metro

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def sources(golden, testdata) -> dict[str, Path]:
    if not (testdata / "data/quarel").is_dir():
        pytest.skip("no rows of quarel in the test data")
    return {
        "model": golden / "checkpoints/metro_tiny_r.pt",
        "vocab": golden / "tiny_vocab",
        "data_dir": testdata / "data",
        "templates": testdata / "prompts/templates",
    }


def run(*command, **environment) -> str:
    programs = Path(sys.executable).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout


def check_rows(rows: list[dict], names: set[str]) -> None:
    assert {row["dataset"] for row in rows} == names
    for row in rows:
        assert 0 < row["chance"] < 1 and 0 <= row["accuracy"] <= 1 and row["examples"] > 0


@pytest.mark.slow
def test_both_routes_from_a_checkpoint_to_accuracies(sources, tmp_path):
    pytest.importorskip("fairseq")
    out = tmp_path / "out"
    script = ROOT / "scripts/finetune_both_routes.sh"
    small = dict(DATASETS="quarel", UPDATES="3", LIMIT="4", TOKENS="600", BATCH="8")
    command = [script, sources["model"], sources["vocab"], out]
    run(*command, sources["data_dir"], sources["templates"], **small)
    for route in ("fairseq_hf", "trainer"):
        check_rows(json.loads((out / f"{route}.json").read_text()), {"quarel"})
        config = json.loads((out / route / "config.json").read_text())
        assert config["decoder_start_token_id"] == 2
        assert (out / route / "modeling_metro_t5.py").is_file()


@pytest.mark.slow
def test_the_comparison_of_objectives_makes_a_table_and_goes_on(sources, tmp_path):
    script = ROOT / "scripts/compare_objectives.py"
    options = [f"--{name.replace('_', '-')}={path}" for name, path in sources.items()]
    options += ["--dataset", "quarel", "--unseen", "trec", "--max-steps", "2", "--batch-size", "4"]
    options += ["--eval-limit", "2", "--use-cpu", "--fresh", "--out", str(tmp_path)]
    run(sys.executable, script, *options)
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table) == {"FLIPPED", "FLIPPED without unlikelihood", "DIRECT", "CHANNEL"}
    for parts in table.values():
        check_rows(parts["trained"], {"quarel"})
        check_rows(parts["unseen"], {"trec"})
    assert "training to update" not in run(sys.executable, script, *options)  # all kept
    given, _ = metro.load(sources["model"], vocab=sources["vocab"])
    start, _ = metro.load(tmp_path / "start")
    assert start.config.d_model == given.config.d_model
    assert not torch.equal(start.shared.weight, given.shared.weight)
