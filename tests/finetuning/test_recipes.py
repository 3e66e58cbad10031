"""The recipes from a checkpoint to a table, on real rows and a tiny model, a few updates each.

Oracle: the prepared examples of the held-out rows: tasks, prompts, counts and level of chance.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from metro.data.prompts.stored import PromptedExamples, read_manifest
from tests.conftest import ROOT


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


def check_tasks(tasks: dict[str, dict], prompts: Path, limit: int) -> None:
    """Oracle: the prepared examples with answer choices, and the share of each choice."""
    questions: dict[str, dict[str, list[float]]] = {}
    for task, facts in read_manifest(prompts)["splits"]["valid"].items():
        name = "/".join(filter(None, (facts["dataset"], facts["subset"])))
        for example in PromptedExamples(prompts / "valid" / task):
            if example["answer_choices"] and example["label"] is not None:
                shares = questions.setdefault(name, {}).setdefault(facts["prompt_name"], [])
                shares.append(1 / len(set(example["answer_choices"])))
    assert set(tasks) == set(questions)
    for name, found in tasks.items():
        expected = questions[name]
        assert set(found["accuracies"]) == set(expected)
        assert found["num_examples"] == min(limit, max(map(len, expected.values())))
        assert found["chance"] == pytest.approx(mean(mean(x) for x in expected.values()))


@pytest.mark.slow
@pytest.mark.fairseq
def test_both_routes_from_a_checkpoint_to_accuracies(sources, tmp_path):
    out = tmp_path / "out"
    script = ROOT / "scripts/finetune_both_routes.sh"
    small = dict(DATASETS="quarel", UPDATES="3", LIMIT="4", TOKENS="600", BATCH="8")
    command = [script, sources["model"], sources["vocab"], out]
    run(*command, sources["data_dir"], sources["templates"], **small)
    for route in ("fairseq_hf", "trainer"):
        summary = json.loads((out / "results" / route / "summary.json").read_text())
        check_tasks(summary["tasks"], out / "text", 4)
        config = json.loads((out / route / "config.json").read_text())
        assert config["decoder_start_token_id"] == 2
        assert (out / route / "modeling_metro_t5.py").is_file()
