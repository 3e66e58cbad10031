"""The demonstration, in few updates: it ends with curves, and what was stopped resumes."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from scripts.demo_text import write_demo_text
from tests.conftest import ROOT

pytest.importorskip("accelerate", reason="accelerate is not installed (make install)")

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


def read_until(process: subprocess.Popen, pattern: str) -> None:
    """Read what the demonstration prints until a line has the pattern."""
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return
    raise AssertionError(seen[-3000:])


@pytest.mark.slow
def test_demo_draws_curves_and_goes_on_where_ctrl_c_stopped_it(demo):
    """Oracle: the training's own messages about the updates that it begins and stops at."""
    folder, start = demo

    first = start(2)
    output = first.communicate(timeout=MINUTES)[0]
    assert first.returncode == 0, output
    assert "2 updates of METRO on" in output
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert_the_model_is_there(folder, output)
    if importlib.util.find_spec("fairseq"):
        assert_fairseq_trains_the_same(folder, output)

    second = start(1000)
    read_until(second, "update 20/1000")
    environment = environment_of_child(second.pid)
    second.send_signal(signal.SIGINT)
    output = second.communicate(timeout=MINUTES)[0]
    assert second.returncode == 130, output
    assert "`make demo` resumes here" in output
    assert environment["OMP_WAIT_POLICY"] == "passive"
    updates = int(re.findall(r"stopped after update (\d+)", output)[-1])

    third = start(updates + 2)
    output = third.communicate(timeout=MINUTES)[0]
    assert third.returncode == 0, output
    assert f"training from update {updates} to update {updates + 2}" in output
    assert f"{updates + 2} updates of METRO on" in output


def assert_the_model_is_there(folder: Path, output: str) -> None:
    """The folder holds the weights of the last checkpoint, and what they know was printed."""
    from safetensors.torch import load_file

    import metro

    model, _ = metro.load(folder / "model")
    stored = load_file(folder / "model/checkpoint-2/model.safetensors")
    for name, tensor in stored.items():
        assert tensor.equal(model.state_dict()[name]), name
    assert "| updates | 2 |" in (folder / "model/README.md").read_text()
    assert output.count("  marked ") == 3
    assert re.search(r"(yes|no ) auxiliary model [0-9.]+ bits, bigram [0-9.]+\n", output)
    assert re.search(r"  [0-9]+ % of the tokens that the RTD head marks were planted\n", output)


def assert_fairseq_trains_the_same(folder: Path, output: str) -> None:
    """The other entrance, with the same configuration, on the same text."""
    options = [f"task.data={folder}/data", f"checkpoint.save_dir={folder}/fairseq"]
    options += ["optimization.max_update=2", "common.log_interval=2"]
    if "--nproc-per-node 2" in output:
        options += ["dataset.max_tokens=512", "optimization.update_freq=[2]"]
    configs = ROOT / "fairseq_plugins/configs/pretraining"
    command = [sys.executable, str(Path(sysconfig.get_path("scripts")) / "fairseq-hydra-train")]
    command += ["--config-dir", str(configs), "--config-name", "metro_t5_tiny", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [theirs] = re.findall(r'train_inner\]\[INFO\] - .*"generator_loss": "([0-9.]+)"', done.stdout)
    history = json.loads((folder / "model/trainer_state.json").read_text())["log_history"]
    [ours] = [line["generator_loss"] for line in history if "grad_norm" in line]
    assert ours == pytest.approx(float(theirs), abs=2e-3)


def environment_of_child(pid: int) -> dict[str, str]:
    """Of the training that the demonstration started."""
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    entries = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
