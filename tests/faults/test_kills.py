"""A tenth of `make faults`: commands killed or without room finish as if they were left alone."""

import json

import pytest

from tests.processes import run_python


@pytest.mark.slow
@pytest.mark.fairseq
def test_a_kill_inside_each_command_loses_nothing():
    """Oracle: each command left alone; `kills.py` compares weights, losses and files."""
    pytest.importorskip("accelerate")
    done = run_python("-m", "tests.faults.kills", "--kills", "1", "--seed", "1", timeout=900)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    total = [int(cell) for cell in rows[-1].strip("| ").split(" | ")[1:]]
    assert total[0] == len(rows) - 2 == 14 and total[2] == 0 and total[4] == 12, json.dumps(rows)
