"""The GPU suite's own logic: what runs, what is skipped, and how it ends.

Oracle: by hand. A program in the place of Python plays the parts, and packages without content
stand for those that parts need.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# `python -m some.module` does what the variable PLAY_some_module says; all else is Python.
PLAYER = """#!/usr/bin/env bash
if [ "$1" = -m ]; then
    play=PLAY_${{2//./_}}
    echo "playing $*"
    eval "${{!play:-true}}"
    exit
fi
exec {python} "$@"
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: {has_gpu})
    get_device_name = staticmethod(lambda: "a GPU")
__version__ = "2.11.0"
"""
PACKAGES = "numpy transformers sentencepiece safetensors jinja2 yaml matplotlib click rich pytest"


@pytest.fixture
def suite(tmp_path):
    """Runs the suite; returns exit status, results and output."""
    packages, out = tmp_path / "packages", tmp_path / "out"
    packages.mkdir()
    for name in PACKAGES.split():
        (packages / f"{name}.py").write_text("")
    (packages / "fairseq_cli").mkdir()
    for name in ("__init__", "preprocess"):
        (packages / f"fairseq_cli/{name}.py").write_text("")
    player = tmp_path / "python"
    player.write_text(PLAYER.format(python=sys.executable))
    player.chmod(0o755)

    def run(*parts: str, has_gpu=True, broken: str = "", **play: str):
        (packages / "torch.py").write_text(TORCH.format(has_gpu=has_gpu))
        if broken:
            (packages / broken).write_text("raise ImportError('No module named sklearn')")
        env = {**os.environ, "PYTHON": str(player), "OUT": str(out), "PYTHONPATH": str(packages)}
        done = subprocess.run(
            [ROOT / "scripts/gpu_suite.sh", *parts],
            env=env | play,
            capture_output=True,
            text=True,
            timeout=120,
        )
        results = json.loads((out / "gpu_suite.json").read_text())
        assert (out / "gpu_suite.log").read_text() in done.stdout
        return done.returncode, results, done.stdout

    return run


def results_of(report: dict) -> dict[str, str]:
    return {name: part["result"] for name, part in report["parts"].items()}


def test_all_parts_run_and_pass(suite):
    code, report, output = suite()
    assert code == 0 and report["ok"] is True
    assert (report["gpu"], report["torch"]) == ("a GPU", "2.11.0")
    names = {"device", "tests", "prepare_text", "pretraining"}
    assert names <= report["parts"].keys()
    assert set(results_of(report).values()) == {"passed"}
    assert "playing -m benchmarks.pretraining --batch-size 32" in output
    assert "tests/gpu/test_pretraining.py" in output


def test_failures_and_time_limits_do_not_stop_the_others(suite):
    code, report, _ = suite(
        "tests",
        "pretraining",
        "prepare_text",
        "device",
        PLAY_pytest="exit 5",
        PLAY_benchmarks_pretraining="sleep 60",
        PLAY_benchmarks_prepare_text="exit 3",
        PART_SECONDS="1",
    )
    assert code == 1 and report["ok"] is False
    assert results_of(report) == {
        "tests": "failed: no test was found",
        "pretraining": "failed: out of time",
        "prepare_text": "failed: exit status 3",
        "device": "passed",
    }


def test_a_part_whose_needs_are_missing_is_skipped_with_the_reason(suite):
    code, report, output = suite("prepare_text", "device", broken="fairseq_cli/preprocess.py")
    assert code == 0 and report["ok"] is True
    assert results_of(report) == {
        "prepare_text": "skipped: needs fairseq_cli.preprocess: No module named sklearn",
        "device": "passed",
    }
    assert "playing -m benchmarks.prepare_text" not in output


def test_without_a_gpu_the_suite_is_not_ok(suite):
    code, report, _ = suite("tests", "evaluation", "device", has_gpu=False)
    assert code == 1 and report["ok"] is False and report["gpu"] is None
    assert results_of(report) == {
        "tests": "skipped: needs cuda: torch sees no GPU",
        "evaluation": "skipped: needs cuda: torch sees no GPU",
        "device": "passed",
    }


def test_wheels_that_cannot_be_installed_are_a_failure(suite, tmp_path):
    code, report, output = suite("device", WHEELS=str(tmp_path / "wheels"), PLAY_pip="exit 1")
    assert code == 1
    assert results_of(report) == {"wheels": "failed: exit status 1", "device": "passed"}
    assert "--no-index --no-deps" in output
