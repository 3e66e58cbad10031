"""The demonstration, in few updates: it ends with curves, and what was stopped resumes."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from scripts.demo_text import write_demo_text
from tests.conftest import ROOT

pytest.importorskip("fairseq", reason="fairseq is not installed (make install)")

MINUTES = 4 * 60


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Starts the demonstration with this number of updates, in a folder of the tests."""
    if not (Path(sysconfig.get_path("scripts")) / "metro").exists():
        pytest.skip("metro is not installed (make install)")
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    write_demo_text(text, 1_000_000)

    def start(num_updates: int) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "scripts/demo.py"), "--updates", str(num_updates)]
        environment = {name: value for name, value in os.environ.items() if name[:4] != "OMP_"}
        process = subprocess.Popen(
            [*command, "--text", str(text), "--folder", str(folder / "demo")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        started.append(process)
        return process

    started: list[subprocess.Popen] = []
    yield folder / "demo", start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait()


def wait_for(path: Path, pattern: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + MINUTES
    while not (path.exists() and re.search(pattern, path.read_text())):
        assert time.monotonic() < end and process.poll() is None, path.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_demo_draws_curves_and_goes_on_where_ctrl_c_stopped_it(demo):
    """Oracle: fairseq's own messages about the checkpoint that it saved and loaded."""
    folder, start = demo
    log = folder / "pretraining.log"

    first = start(2)
    output = first.communicate(timeout=MINUTES)[0]
    assert first.returncode == 0, output
    assert "2 updates of METRO on" in output
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert_model_is_exported(folder, output)

    second = start(1000)
    wait_for(log, '"num_updates": "20"', second)
    environment = environment_of_child(second.pid)
    second.send_signal(signal.SIGINT)
    output = second.communicate(timeout=MINUTES)[0]
    assert second.returncode == 130, output
    assert "`make demo` resumes here" in output
    assert environment["OMP_WAIT_POLICY"] == "passive"
    updates = int(re.findall(r"stopped after update (\d+)", log.read_text())[-1])
    before = len(log.read_text())

    third = start(updates + 2)
    output = third.communicate(timeout=MINUTES)[0]
    assert third.returncode == 0, output
    assert re.search(rf"Loaded checkpoint .*@ {updates} updates\)", log.read_text()[before:])
    assert f"{updates + 2} updates of METRO on" in output


def assert_model_is_exported(folder: Path, output: str) -> None:
    """The folder holds the weights of the last checkpoint, and what they know was printed."""
    import torch

    import metro
    from metro.models.loading import load_pretraining_model

    model, _ = metro.load(folder / "model")
    checkpoint = torch.load(folder / "checkpoints/checkpoint_last.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint["model"][f"model.main.{name}"], tensor), name
    assert "| updates | 2 |" in (folder / "model/README.md").read_text()
    extra = load_pretraining_model(folder / "model").state_dict()
    for name in ("rtd_head.weight", "auxiliary.lm_head.bias"):
        assert torch.equal(checkpoint["model"][f"model.{name}"], extra[name]), name
    assert output.count("  marked ") == 3
    assert re.search(r"(yes|no ) auxiliary model [0-9.]+ bits, bigram [0-9.]+\n", output)


def environment_of_child(pid: int) -> dict[str, str]:
    """Of the training that the demonstration started."""
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    entries = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
