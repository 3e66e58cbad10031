"""Stopping and crashing: signals, failed writes, kills, damaged checkpoints, NaN losses."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from fairseq_plugins.tasks.t5_metro import T5MetroTask
from metro.utils.messages import UserError
from tests.plugins.conftest import (
    METRO,
    ROOT,
    TINY,
    assert_equal_runs,
    load,
    run,
    start,
)
from tests.processes import run_python

LAST = "checkpoint_last.pt"


# --- stopping -----------------------------------------------------------------------------------


def test_sigterm_saves_and_the_resumed_run_is_bit_exact(train, tmp_path, monkeypatch):
    train(tmp_path / "whole", "--max-update 6")
    step = Trainer.train_step

    def step_and_terminate(self, samples, raise_oom=False):
        if self.get_num_updates() == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, samples, raise_oom)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_terminate)
        stopped = train(tmp_path / "stopped", "--max-update 6")
    assert "stopped after update 3" in stopped.text
    assert not stopped.logged("valid")
    assert signal.getsignal(signal.SIGTERM) == before
    train(tmp_path / "stopped", "--max-update 6")
    assert_equal_runs(load(tmp_path / "whole" / LAST), load(tmp_path / "stopped" / LAST))


READING_AHEAD = """
import sys, time, torch
import fairseq_plugins.compat
from fairseq.data.iterators import BufferedIterator

class Batches:
    def __len__(self):
        return 1_000_000

    def __iter__(self):
        matrix = torch.ones(400, 400)
        for _ in range(len(self)):
            yield matrix @ matrix

next(BufferedIterator(int(sys.argv[1]), Batches()))
time.sleep(0.1)
"""


@pytest.mark.parametrize("buffer_size", [1, 1_000_000], ids=["waits", "prepares"])
def test_a_run_ends_while_fairseq_reads_ahead(buffer_size):
    """Without the repair, the thread that prepares batches aborts the process."""
    # Sooner than a reader is given up that does not end.
    run_python("-c", READING_AHEAD, buffer_size, timeout=50)


def output_of_stopped(process, stop) -> str:
    """Call `stop` after update 3; all that the run has printed."""
    seen = ""
    for line in process.stdout:
        seen += line
        if '"num_updates": "3"' in line:
            stop()
            break
    return seen + process.communicate(timeout=60)[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ctrl_c_saves_and_ends_with_an_error_code(corpus, tmp_path, num_workers):
    """To the whole process group, as a terminal sends it; a loading process does not die of it."""
    options = [*TINY, *METRO, f"--save-dir {tmp_path} --max-update 100000"]
    options += ["--update-freq 2", f"--num-workers {num_workers}"]
    process = start("fairseq-train", str(corpus), *options, session=True)
    seen = output_of_stopped(process, lambda: os.killpg(process.pid, signal.SIGINT))
    assert process.returncode == 130, seen[-4000:]
    updates = load(tmp_path / LAST)["optimizer_history"][-1]["num_updates"]
    assert f"stopped after update {updates};" in seen and "Traceback" not in seen


@pytest.mark.parametrize("place", ["first", "later"])
def test_a_stop_within_an_update_is_at_once_and_the_resumed_run_is_bit_exact(
    train, tmp_path, monkeypatch, place
):
    """Between two of four micro-batches. Oracle: a run that was left alone; the steps counted."""
    options = ["--max-update 6 --update-freq 4 --max-tokens 128 --tokens-per-sample 16"]
    whole = train(tmp_path / "whole", *options)
    before, seen = 0 if place == "first" else 2, []
    step = T5MetroTask.train_step

    def step_and_terminate(self, sample, model, criterion, optimizer, update_num, *rest, **more):
        seen.append(update_num)
        if seen.count(before) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, sample, model, criterion, optimizer, update_num, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(T5MetroTask, "train_step", step_and_terminate)
        stopped = train(tmp_path / "stopped", *options)
    assert f"stopped after update {before}" in stopped.text and seen.count(before) == 2
    assert (tmp_path / "stopped" / LAST).exists() == (before > 0)
    resumed = train(tmp_path / "stopped", *options)
    assert_equal_runs(load(tmp_path / "whole" / LAST), load(tmp_path / "stopped" / LAST))
    losses = [line["loss"] for run in (stopped, resumed) for line in run.logged("train_inner")]
    assert losses == [line["loss"] for line in whole.logged("train_inner")]


@pytest.mark.parametrize("asked", ["torchrun", "one worker"])
def test_sigterm_saves_one_checkpoint_of_all_processes(corpus, tmp_path, asked):
    """At the end of an epoch of three updates, or soon after it, whoever gets the signal."""
    options = [*TINY, *METRO, f"--save-dir {tmp_path} --max-update 100000 --update-freq 3"]
    process = start("fairseq-train", str(corpus), *options, processes=2)

    def stop():
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if asked == "torchrun" else int(workers[-1]), signal.SIGTERM)

    seen = output_of_stopped(process, stop)
    assert "stopped after update" in seen, seen[-4000:]
    updates = load(tmp_path / LAST)["optimizer_history"][-1]["num_updates"]
    assert f"stopped after update {updates};" in seen


# --- crashing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["fairseq-train", pytest.param("fairseq-hydra-train", marks=pytest.mark.slow)]
)
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_keeps_the_one_before(
    corpus, tmp_path, command
):
    """A limit on file sizes stands for a full disk. Oracle: a run with room."""
    options = [str(corpus), *TINY, *METRO, f"--save-dir {tmp_path} --save-interval-updates 2"]
    if command == "fairseq-hydra-train":
        options = [
            f"--config-dir {ROOT}/fairseq_plugins/configs/pretraining --config-name metro_t5_tiny",
            f"common.user_dir={ROOT}/fairseq_plugins task.data={corpus} common.fp16=false",
            f"checkpoint.save_dir={tmp_path} checkpoint.save_interval_updates=2",
            "task.tokens_per_sample=32 dataset.max_tokens=256",
        ]
    limits = {"--max-update 2": None, "--max-update 4": 20_000}
    for limit, most in limits.items():
        if command == "fairseq-hydra-train":
            limit = limit.replace("--max-update ", "optimization.max_update=")
        done = run(command, *options, limit, code=None, most_bytes=most)
    assert done.code == 1 and "Traceback" not in done.text
    assert done.text.splitlines()[-1].startswith(f"error: {tmp_path}/checkpoint_1_4.pt ")
    assert "ulimit -f" in done.text.splitlines()[-1]
    assert load(tmp_path / LAST)["optimizer_history"][-1]["num_updates"] == 2
    assert not list(tmp_path.glob("*.tmp"))
    run(command, *options, limit)
    assert load(tmp_path / LAST)["optimizer_history"][-1]["num_updates"] == 4


def test_a_kill_at_any_moment_of_saving_leaves_a_loadable_last_checkpoint(tmp_path):
    """A child process saves again and again and is killed; each time the newest file must load."""
    last, other = str(tmp_path / LAST), str(tmp_path / "checkpoint_1_2.pt")
    state = {"extra_state": {"train_iterator": {}}, "optimizer_history": [{"num_updates": 0}]}
    checkpoint_utils.torch_persistent_save(state, last)
    for delay in (0.02, 0.05, 0.09, 0.14, 0.2):
        child = os.fork()
        if child == 0:
            for count in range(10_000):
                big = {**state, "count": count, "model": {"w": torch.zeros(500_000)}}
                checkpoint_utils.torch_persistent_save(big, other)
                checkpoint_utils.PathManager.copy(other, last, overwrite=True)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        load(tmp_path / LAST)
        if os.path.exists(other):
            load(tmp_path / "checkpoint_1_2.pt")


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "flip", "missing"])
def test_a_damaged_last_checkpoint_gives_way_to_the_newest_that_loads(train, tmp_path, damage):
    options = "--max-update 4 --save-interval-updates 2 --disable-validation"
    train(tmp_path, options)
    whole = load(tmp_path / LAST)
    assert (tmp_path / "checkpoint_1_2.pt").exists() and (tmp_path / "checkpoint_1_4.pt").exists()
    # the newest one is damaged too, as after a disk that ran full
    content = (tmp_path / LAST).read_bytes()
    (tmp_path / "checkpoint_1_4.pt").unlink()
    (tmp_path / LAST).unlink()
    if damage != "missing":
        half, rest = content[: len(content) // 2], content[len(content) // 2 :]
        left = {"empty": b"", "cut": half, "zeros": bytes(len(content))}
        left = {**left, "flip": half + bytes([rest[0] ^ 4]) + rest[1:]}[damage]
        (tmp_path / LAST).write_bytes(left)
        (tmp_path / "checkpoint_1_4.pt").write_bytes(left)
    resumed = train(tmp_path, options)
    said = "IS MISSING. CONTINUING FROM" if damage == "missing" else "IS DAMAGED"
    assert said in resumed.text and "checkpoint_1_2.pt" in resumed.text
    assert [line["num_updates"] for line in resumed.logged("train_inner")] == ["3", "4"]
    assert_equal_runs(whole, load(tmp_path / LAST))


def test_last_checkpoint_alone_and_damaged_is_refused(train, tmp_path):
    tmp_path.joinpath(LAST).write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged .* remove it to start again"):
        train(tmp_path, "--max-update 1")


def test_a_damaged_checkpoint_that_the_user_named_is_an_error(train, tmp_path):
    """Going on from, or validating, another file than the named one would be wrong."""
    train(tmp_path / "a", "--max-update 2 --save-interval-updates 1 --disable-validation")
    named = tmp_path / "a" / LAST
    content = named.read_bytes()
    named.unlink()
    named.write_bytes(content[:1000])
    with pytest.raises(UserError, match=f"{named} is damaged .*: copy it again"):
        checkpoint_utils.load_checkpoint_to_cpu(str(named))
    with pytest.raises(UserError, match=f"{named} is damaged .*: copy it again"):
        train(tmp_path / "b", f"--max-update 3 --restore-file {named}")


def test_a_checkpoint_with_foreign_code_is_not_executed(train, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "evil.pt"
    torch.save({"cfg": None, "model": {}, "extra": Evil()}, path)
    with pytest.raises(ValueError, match="evil.pt is refused, .*posix.mkdir"):
        train(tmp_path / "save", f"--max-update 1 --restore-file {path}")
    assert not (tmp_path / "executed").exists()

    # nor does a run that resumes by itself go on from an older file as if nothing had happened
    save = tmp_path / "resumed"
    train(save, "--max-update 2 --save-interval-updates 1 --disable-validation")
    before = load(save / "checkpoint_1_2.pt")
    for extra in ({}, {"_use_new_zipfile_serialization": False}):
        (save / LAST).unlink()
        torch.save({**before, "extra": Evil()}, save / LAST, **extra)
        with pytest.raises(ValueError, match=f"resumed/{LAST} is refused, .*posix.mkdir"):
            train(save, "--max-update 3 --disable-validation")
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_turns_nan_stops_the_run_naming_update_and_examples(
    train, tmp_path, monkeypatch
):
    seen = []
    step = Trainer.train_step

    def record(self, samples, raise_oom=False):
        seen.append([sample["id"].tolist() for sample in samples])
        if len(seen) == 2:
            with torch.no_grad():
                self.get_model().model.main.lm_head.weight.fill_(float("nan"))
        return step(self, samples, raise_oom)

    monkeypatch.setattr(Trainer, "train_step", record)
    with pytest.raises(FloatingPointError, match="loss of update 2 is NaN or infinite") as error:
        train(tmp_path, "--max-update 5 --update-freq 2")
    assert all(str(ids) in str(error.value) for ids in seen[1])
    assert len(seen) == 2


def test_nan_gradients_with_finite_losses_name_update_and_examples(train, tmp_path, monkeypatch):
    step = Trainer.clip_grad_norm
    monkeypatch.setattr(Trainer, "clip_grad_norm", lambda self, n: step(self, n) * float("nan"))
    with pytest.raises(FloatingPointError, match="update 1 failed .*losses of this process are"):
        train(tmp_path, "--max-update 5")


def test_bf16_on_the_command_line_trains(train, tmp_path):
    """fairseq would look for a TPU."""
    lines = train(tmp_path, "--max-update 2 --bf16").logged("train_inner")
    assert len(lines) == 2


def test_fp16_without_gpu_is_refused(train, tmp_path, monkeypatch):
    """Before the model is built, which takes a minute."""
    monkeypatch.setattr(T5MetroTask, "build_model", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match="fp16 is true but the run is on CPU"):
        train(tmp_path, "--max-update 1 --fp16")
