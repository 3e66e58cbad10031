"""Training as a user runs it: several processes, stopping, resuming, crashing, validating."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from fairseq_plugins.tasks.t5_metro import T5MetroTask
from tests.plugins.conftest import (
    METRO,
    NO_DROPOUT,
    ROOT,
    T5,
    TINY,
    assert_equal_runs,
    load,
    run,
    start,
    write_corpus,
)

LAST = "checkpoint_last.pt"


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """One process, two accumulation steps, no dropout; 9 updates, past the end of an epoch."""
    save = tmp_path_factory.mktemp("reference")
    options = [*TINY, *METRO, NO_DROPOUT, f"--save-dir {save} --update-freq 2 --max-update 9"]
    run("fairseq-train", str(corpus), *options)
    return load(save / LAST)


def test_two_processes_train_the_model_of_one(corpus, tmp_path, reference):
    """Also when resumed, and with both kinds of gradient averaging."""
    options = [str(corpus), *TINY, *METRO, NO_DROPOUT, f"--save-dir {tmp_path}"]
    run("fairseq-train", *options, "--max-update 3", processes=2)
    resumed = run("fairseq-train", *options, "--max-update 9 --ddp-backend legacy_ddp", processes=2)
    assert "training on 2 devices" in resumed.text
    assert "(epoch 1 @ 3 updates)" in resumed.text
    assert_equal_runs(load(tmp_path / LAST), reference)


def test_two_processes_train_the_t5_of_one(corpus, tmp_path):
    options = [str(corpus), *TINY, *T5, NO_DROPOUT, "--max-update 4"]
    alone = f"--save-dir {tmp_path / 'alone'} --update-freq 2"
    run("fairseq-train", *options, alone)
    run("fairseq-train", *options, f"--save-dir {tmp_path / 'both'}", processes=2)
    assert_equal_runs(load(tmp_path / "alone" / LAST), load(tmp_path / "both" / LAST))


def test_two_processes_through_hydra_train_the_model_of_one(corpus, tmp_path, reference):
    """fairseq-hydra-train imports the user dir after deciding that it runs alone.

    The packages are copies, as an installed wheel has them, and nothing else of the checkout.
    """
    site = tmp_path / "site"
    for package in ("metro", "fairseq_plugins"):
        shutil.copytree(ROOT / package, site / package)
    options = [
        f"--config-dir {site}/fairseq_plugins/configs/pretraining --config-name metro_t5_tiny",
        f"common.user_dir={site}/fairseq_plugins",
        f"task.data={corpus} checkpoint.save_dir={tmp_path} task.tokens_per_sample=32",
        "model.encoder_embed_dim=16 model.encoder_ffn_embed_dim=32 model.encoder_layers=1",
        "model.encoder_attention_heads=2 model.max_positions=64 ++model.dropout=0",
        "++model.attention_dropout=0 model.generator_zero_dropout=false dataset.max_tokens=256",
        "++criterion.weighted_lm_loss=false lr_scheduler.warmup_updates=2",
        "criterion.masked_positions_only=lm task.mask_prob=0.15 model.init_token_std=null",
        "model.init_position_std=null model.init_auxiliary_std=null",
        "model.init_neighbour_slope=0 model.init_copy_gain=0",
        "++lr_scheduler.total_num_update=40 common.log_interval=1 ++dataset.num_workers=0",
        "optimization.lr=[0.003]",
    ]
    both = {"processes": 2, "folder": site}
    run("fairseq-hydra-train", *options, "optimization.max_update=3", **both)
    resumed = run("fairseq-hydra-train", *options, "optimization.max_update=9", **both)
    assert "training on 2 devices" in resumed.text
    assert "(epoch 1 @ 3 updates)" in resumed.text
    assert_equal_runs(load(tmp_path / LAST), reference)


@pytest.mark.parametrize("kind", [METRO, T5], ids=["metro", "t5"])
def test_a_resumed_run_is_bit_exact_with_dropout(train, tmp_path, kind):
    """20 updates cross the end of an epoch; the run stops in the middle of the first one."""
    whole = train(tmp_path / "whole", "--max-update 20", kind=kind)
    train(tmp_path / "halves", "--max-update 7", kind=kind)
    resumed = train(tmp_path / "halves", "--max-update 20", kind=kind)
    assert max(line["epoch"] for line in whole.logged("train_inner")) == 2
    assert_equal_runs(load(tmp_path / "whole" / LAST), load(tmp_path / "halves" / LAST))
    losses = [line["loss"] for line in whole.logged("train_inner")]
    assert losses[7:] == [line["loss"] for line in resumed.logged("train_inner")]


@pytest.mark.parametrize("stop", [3, 6])
def test_a_run_over_several_shards_resumes_bit_exactly(train, tmp_path, stop):
    """Shards of 4 and 3 updates, so it stops in the first shard or in the second."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, num_documents in zip(folders, (16, 11), strict=True):
        write_corpus(folder, num_documents)
    data = os.pathsep.join(map(str, folders))
    whole = train(tmp_path / "whole", "--max-update 10", data=data)
    train(tmp_path / "halves", f"--max-update {stop}", data=data)
    resumed = train(tmp_path / "halves", "--max-update 10", data=data)
    epochs = [line["epoch"] for line in whole.logged("train_inner")]
    assert [epochs.count(epoch) for epoch in (1, 2, 3)] == [4, 3, 3]
    assert [line["epoch"] for line in resumed.logged("train_inner")] == epochs[stop:]
    assert_equal_runs(load(tmp_path / "whole" / LAST), load(tmp_path / "halves" / LAST))


def test_a_run_with_a_loader_process_resumes_bit_exactly(train, tmp_path):
    """fairseq's default, one process that prepares batches; also equal to none at all."""
    train(tmp_path / "none", "--max-update 6")
    train(tmp_path / "halves", "--max-update 3 --num-workers 1")
    train(tmp_path / "halves", "--max-update 6 --num-workers 1")
    assert_equal_runs(load(tmp_path / "none" / LAST), load(tmp_path / "halves" / LAST))


def test_all_published_metrics_are_logged(train, tmp_path):
    line = train(tmp_path, "--max-update 1").logged("train_inner")[0]
    published = "loss nll_loss ppl generator_loss discriminator_loss rtd_loss replace_ratio"
    accuracies = "generator replaced unreplaced rtd_replaced rtd_unreplaced"
    expected = {*published.split(), *(f"{name}_accuracy" for name in accuracies.split())}
    assert expected <= line.keys()


def test_losses_are_logged_beside_what_guessing_would_reach(train, corpus, tmp_path):
    """N-gram bits as `metro prepare-text` counted them; RTD labels by the formula of entropy."""
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    bits = {"unigram": 8.9, "bigram": 6.7, "trigram": 6.1, "train_tokens": 5}
    (data / "prepare_text.json").write_text(json.dumps({"reference_bits": bits}))
    log = train(tmp_path / "run", "--max-update 2", data=data)
    for line in log.logged("valid"):
        logged = {name: float(line[f"valid_{name}_bits"]) for name in ("unigram", "bigram")}
        assert logged == {"unigram": 8.9, "bigram": 6.7}
    for line in log.logged("train_inner"):
        assert "unigram_bits" not in line
        r = float(line["replace_ratio"]) / 100
        expected = -r * np.log2(r) - (1 - r) * np.log2(1 - r)
        assert float(line["rtd_label_entropy"]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", [METRO, T5], ids=["metro", "t5"])
def test_training_without_a_masked_position(train, tmp_path, kind):
    """METRO then scores nothing and has no perplexity; T5 predicts the closing sentinel."""
    done = train(tmp_path, "--max-update 2 --mask-prob 0", kind=kind)
    lines = done.logged("train_inner")
    assert len(lines) == 2
    assert all(("ppl" in line) == (kind is T5) for line in lines)
    [epoch] = done.logged("train")
    assert ("train_text_wps" in epoch) == (kind is T5)
    if kind is T5:  # it reads whole texts, and its targets are sentinels alone
        assert float(epoch["train_text_wps"]) > 2 * float(epoch["train_target_wps"]) > 0


@pytest.mark.parametrize("kind", [METRO, T5], ids=["metro", "t5"])
def test_any_length_fits_a_model_of_just_that_length(train, tmp_path, kind):
    """30 is not a multiple of 8, and so many masks make T5's targets one token too long."""
    options = "--tokens-per-sample 30 --max-positions 30 --mask-prob 0.95 --mask-multiple-length 1"
    log = train(tmp_path, f"{options} --max-update 12", kind=kind)
    losses = [float(line["loss"]) for line in log.logged("train_inner")]
    assert len(log.logged("train_inner")) == 12 and np.isfinite(losses).all()
    validated = [float(line["valid_loss"]) for line in log.logged("valid")]
    assert validated and np.isfinite(validated).all()


def test_a_finished_job_started_again_trains_no_further_update(train, tmp_path):
    train(tmp_path, "--max-update 3")
    before = load(tmp_path / LAST)
    again = train(tmp_path, "--max-update 3")
    assert "nothing to do: 3 of 3 updates are already done" in again.text
    assert not again.logged("train_inner")
    assert_equal_runs(before, load(tmp_path / LAST))


def test_fairseq_validate_agrees_with_the_training_log(train, corpus, tmp_path):
    """All but speed and batch size, which fairseq-validate sums up where training averages."""
    logged = train(tmp_path, "--max-update 4").logged("valid")[-1]
    validated = run(
        "fairseq-validate",
        f"{corpus} --user-dir fairseq_plugins --task t5_metro --path {tmp_path / LAST}",
        "--max-tokens 256 --required-batch-size-multiple 8 --log-format json --cpu",
        "--skip-invalid-size-inputs-valid-test --num-workers 0",
    ).logged("valid")[-1]
    for name, value in validated.items():
        if name not in {"epoch", "valid_wps", "valid_wpb", "valid_bsz"}:
            assert float(value) == pytest.approx(float(logged[name]), abs=2e-3, nan_ok=True), name


def test_training_goes_on_from_a_checkpoint_of_the_original(train, golden, recorded_text, tmp_path):
    """Oracle: the loss that the original logged at the end of that run, 38 bits; random is 65."""
    checkpoint = golden / "checkpoints/metro_tiny_a.pt"
    options = [
        "--encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-layers 2",
        "--encoder-attention-heads 4 --max-positions 1024 --tokens-per-sample 128",
        "--max-tokens 1024 --weighted-lm-loss --max-update 1 --disable-validation",
        f"--finetune-from-model {checkpoint}",
    ]
    line = train(tmp_path, *options, NO_DROPOUT, data=recorded_text).logged("train_inner")[0]
    assert 36 < float(line["loss"]) < 41


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


@pytest.mark.parametrize("command", ["fairseq-train", "fairseq-hydra-train"])
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


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "missing"])
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
        half = content[: len(content) // 2]
        left = {"empty": b"", "cut": half, "zeros": bytes(len(content))}[damage]
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
    with pytest.raises(RuntimeError):
        checkpoint_utils.load_checkpoint_to_cpu(str(named))
    with pytest.raises(RuntimeError):
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
