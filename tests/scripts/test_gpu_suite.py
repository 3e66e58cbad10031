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
PACKAGES = (
    "numpy transformers sentencepiece safetensors jinja2 yaml matplotlib click rich pytest xdist"
)


@pytest.fixture
def suite(tmp_path):
    """Runs the suite; returns exit status, results and output."""
    packages, out = tmp_path / "packages", tmp_path / "out"
    packages.mkdir()
    for name in PACKAGES.split():
        (packages / f"{name}.py").write_text("")
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
            timeout=240,
        )
        results = json.loads((out / "gpu_suite.json").read_text())
        assert (out / "gpu_suite.log").read_text() in done.stdout
        return done.returncode, results, done.stdout

    return run


def results_of(report: dict) -> dict[str, str]:
    return {name: part["result"] for name, part in report["parts"].items()}


PARTS = ["check", "pretraining", "curves", "ops", "evaluation", "tests"]


def test_all_parts_run_in_the_order_of_their_value_and_pass(suite):
    """480 s: each has the time up to its share of them."""
    code, report, output = suite()
    assert code == 0 and report["ok"] is True
    assert (report["gpu"], report["torch"]) == ("a GPU", "2.11.0")
    assert list(report["parts"]) == PARTS
    assert set(results_of(report).values()) == {"passed"}
    limits = [part["limit"] for part in report["parts"].values()]
    ends = [43, 225, 283, 360, 408, 480]
    assert all(end - 60 < limit <= end for limit, end in zip(limits, ends, strict=True))
    assert "playing -m benchmarks.pretraining --batch-size 32" in output
    assert "tests/gpu/test_pretraining.py" in output and "-n 8" in output


def test_what_has_ended_is_on_disk_while_the_next_part_runs(suite):
    see = 'grep -c passed "$OUT/gpu_suite.json"; exit 1'
    code, report, output = suite("check", "pretraining", PLAY_benchmarks_pretraining=see)
    assert code == 1 and "\n1\n" in output
    assert results_of(report) == {"check": "passed", "pretraining": "failed: exit status 1"}


def test_failures_and_time_limits_do_not_stop_the_others(suite):
    code, report, _ = suite(
        *("curves", "pretraining", "ops", "check"),
        PLAY_benchmarks_pretraining_curves="sleep 60",
        PLAY_benchmarks_pretraining="sleep 60",
        PLAY_benchmarks_ops="exit 3",
        TOTAL_SECONDS="4",
    )
    assert code == 1 and report["ok"] is False
    assert results_of(report) == {
        "curves": "failed: out of time",
        "pretraining": "failed: out of time",
        "ops": "failed: exit status 3",
        "check": "passed",
    }


def test_a_part_whose_needs_are_missing_is_skipped_with_the_reason(suite):
    code, report, output = suite("tests", "check", broken="pytest.py")
    assert code == 0 and report["ok"] is True
    assert results_of(report) == {
        "tests": "skipped: needs pytest: No module named sklearn",
        "check": "passed",
    }
    assert "playing -m pytest" not in output


def test_without_a_gpu_the_suite_is_not_ok(suite):
    code, report, _ = suite("tests", "check", has_gpu=False)
    assert code == 1 and report["ok"] is False and report["gpu"] is None
    assert results_of(report) == {
        "tests": "skipped: needs cuda: torch sees no GPU",
        "check": "passed",
    }


def test_wheels_that_cannot_be_installed_are_a_failure(suite, tmp_path):
    code, report, output = suite("check", WHEELS=str(tmp_path / "wheels"), PLAY_pip="exit 1")
    assert code == 1
    assert results_of(report) == {"wheels": "failed: exit status 1", "check": "passed"}
    assert "--no-index --no-deps" in output


@pytest.mark.slow
def test_a_dry_run_computes_every_part_on_the_cpu(tmp_path, testdata):
    """As on a GPU, but small and with Triton's interpreter: parts, rows and targets are there."""
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "DRY_RUN": "1"}
    env |= {"TOTAL_SECONDS": "1500"}
    done = subprocess.run([ROOT / "scripts/gpu_suite.sh"], env=env, capture_output=True, text=True)
    report = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert results_of(report) == dict.fromkeys(PARTS, "passed"), done.stdout[-3000:]
    speed = json.loads((tmp_path / "pretraining.json").read_text())
    assert {(row["way"], row["padding"]) for row in speed["rows"]} >= {("metro", "none")}
    assert all(row["tokens/s"] > 0 and row["peak GiB"] > 0 for row in speed["rows"])
    for subject in ("pretraining_curves", "ops", "evaluation"):
        assert json.loads((tmp_path / f"{subject}.json").read_text())["environment"]
    assert "the published way" in done.stdout
