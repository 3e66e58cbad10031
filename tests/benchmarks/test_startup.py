"""What commands cost to start."""

import json
from pathlib import Path

import pytest

from benchmarks.startup import IMPORTS, commands, seconds_of
from tests.conftest import ROOT


def test_seconds_are_of_the_process_and_its_children():
    """Oracle: a child that computes for half a second of its own clock."""
    child = "import time\nwhile time.process_time() < 0.5: pass"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert 0.5 < seconds_of(["-c", parent]) < 2


def test_a_command_that_fails_is_not_measured():
    with pytest.raises(RuntimeError, match="no such thing"):
        seconds_of(["-c", "raise SystemExit('no such thing')"])


def test_committed_rows_are_those_of_the_code():
    result = json.loads((ROOT / "benchmarks/results/startup.json").read_text("utf-8"))
    assert [row["command"] for row in result["rows"]] == [*IMPORTS, *commands(Path(), 0)]
