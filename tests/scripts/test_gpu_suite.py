"""The GPU suite's own logic: what runs, what is skipped, and how it ends.

Oracle: by hand. A program in the place of Python plays the parts, and packages without content
stand for those that parts need.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.timing import subject_on
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
PACKAGES = "numpy transformers sentencepiece safetensors jinja2 yaml matplotlib click rich triton"
PACKAGES += " pytest xdist"


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
    (tmp_path / "testdata/data").mkdir(parents=True)
    testdata = str(tmp_path / "testdata")

    def run(*parts: str, has_gpu=True, broken: str = "", **play: str):
        (packages / "torch.py").write_text(TORCH.format(has_gpu=has_gpu))
        if broken:
            (packages / broken).write_text("raise ImportError('No module named sklearn')")
        env = {**os.environ, "PYTHON": str(player), "OUT": str(out), "PYTHONPATH": str(packages)}
        env |= {"METRO_TESTDATA": testdata}
        done = subprocess.run(
            [ROOT / "scripts/gpu_suite.sh", *parts],
            env=env | play,
            capture_output=True,
            text=True,
            timeout=240,
        )
        place = Path(play.get("OUT", out) or done.stdout.rpartition("results: ")[2].strip())
        results = json.loads((place / "gpu_suite.json").read_text())
        assert (place / "gpu_suite.log").read_text() in done.stdout
        return done.returncode, results, done.stdout

    return run


def results_of(report: dict) -> dict[str, str]:
    return {name: part["result"] for name, part in report["parts"].items()}


SHARES = (9, 47, 59, 75, 85, 100)
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
    assert "playing -m benchmarks.self_check --device cuda" in output
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


def test_a_part_that_is_killed_leaves_its_rows_and_its_targets(suite, tmp_path):
    """What an earlier suite left is not counted."""
    (tmp_path / "out").mkdir()
    earlier = {"subject": "ops_gpu", "targets": ["a: met"], "rows": []}
    (tmp_path / "out/ops_gpu.json").write_text(json.dumps(earlier))
    os.utime(tmp_path / "out/ops_gpu.json", (1, 1))
    unfinished = {"subject": "pretraining_gpu", "targets": ["tokens/s: met"], "rows": [1]}
    code, report, _ = suite(
        "pretraining",
        PLAY_benchmarks_pretraining=f"echo '{json.dumps(unfinished)}' >$OUT/pretraining_gpu.json;"
        "sleep 60",
        TOTAL_SECONDS="6",
    )
    assert code == 1 and results_of(report) == {"pretraining": "failed: out of time"}
    assert report["targets"] == {"pretraining_gpu": ["tokens/s: met"]}
    assert json.loads((tmp_path / "out/pretraining_gpu.json").read_text()) == unfinished


def test_without_data_evaluation_is_skipped(suite, tmp_path):
    code, report, output = suite("evaluation", "check", METRO_TESTDATA=str(tmp_path / "none"))
    assert code == 0
    needs = "skipped: needs data: rows of T0's sets, see METRO_TESTDATA"
    assert results_of(report) == {"evaluation": needs, "check": "passed"}
    assert "playing -m benchmarks.evaluation" not in output


def test_a_dry_run_leaves_the_committed_results_alone(suite):
    """Without OUT they go to a new temporary folder."""
    code, _, output = suite("check", OUT="", DRY_RUN="1", has_gpu=False)
    out = Path(output.rpartition("results: ")[2].strip())
    assert code == 0 and ROOT not in out.parents and (out / "gpu_suite.json").is_file()
    shutil.rmtree(out)


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
    assert results_of(report) == dict.fromkeys(
        ("tests", "check"), "skipped: needs cuda: torch sees no GPU"
    )


def test_wheels_that_cannot_be_installed_are_a_failure(suite, tmp_path):
    code, report, output = suite("check", WHEELS=str(tmp_path / "wheels"), PLAY_pip="exit 1")
    assert code == 1
    assert results_of(report) == {"wheels": "failed: exit status 1", "check": "passed"}
    assert "--no-index --no-deps" in output


def test_wheels_take_their_time_from_that_of_the_parts(suite, tmp_path):
    """Oracle: by hand; 3 s of 40 are gone, and the check has 9 % of the rest, rounded down.

    Of the wheels' 6 s a second or two may be gone before they begin.
    """
    play = {"WHEELS": str(tmp_path / "wheels"), "PLAY_pip": "sleep 3", "TOTAL_SECONDS": "40"}
    _, report, _ = suite("check", "tests", **play)
    limits = {name: part["limit"] for name, part in report["parts"].items()}
    assert 3 < limits["wheels"] <= 6 and limits["check"] <= 3
    assert 40 - 10 < limits["tests"] <= 37


@pytest.mark.slow
def test_a_dry_run_computes_every_part_on_the_cpu(tmp_path, testdata):
    """As on a GPU, but small and with Triton's interpreter: order, limits, rows and targets."""
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "DRY_RUN": "1"}
    env |= {"TOTAL_SECONDS": "3600"}
    done = subprocess.run([ROOT / "scripts/gpu_suite.sh"], env=env, capture_output=True, text=True)
    report = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert results_of(report) == dict.fromkeys(PARTS, "passed"), done.stdout[-3000:]
    assert list(report["parts"]) == PARTS
    ended = 0
    for (_, part), share in zip(report["parts"].items(), SHARES, strict=True):
        assert 36 * share - ended - 120 < part["limit"] <= 36 * share - ended
        ended += part["seconds"]
    checked = json.loads((tmp_path / "self_check.json").read_text())
    assert [row["fault"] for row in checked["rows"]] == [None] * checked["of"] == [None] * 4
    speed = json.loads((tmp_path / f"{subject_on('cpu', 'pretraining_small')}.json").read_text())
    assert {(row["way"], row["padding"]) for row in speed["rows"]} >= {("metro", "none")}
    assert all(row["tokens/s"] > 0 and row["peak GiB"] > 0 for row in speed["rows"])
    evaluation = subject_on("cpu", "evaluation_1_64")
    for subject in ("pretraining_curves_small", "ops", evaluation):
        assert json.loads((tmp_path / f"{subject}.json").read_text())["environment"]
    assert "the published way" in report["targets"][evaluation][0]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["self_check", "pretraining", "pretraining_curves"])
def test_a_benchmark_that_is_killed_leaves_what_it_had(tmp_path, module):
    """Killed once there is a result, before all are; nothing of it is half a file."""
    argv = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cpu"]
    subject = module
    if module == "pretraining":
        argv += ["--size", "small", "--batch-size", "1"]
        subject = subject_on("cpu", "pretraining_small")
    env = {**os.environ, "OUT": str(tmp_path), "TRITON_INTERPRET": "1"}
    path, deadline = tmp_path / f"{subject}.json", time.monotonic() + 300
    process = subprocess.Popen(argv, cwd=ROOT, env=env, start_new_session=True)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = json.loads(path.read_text())
    assert len(found["rows"] or found["losses"]) == 1
