"""Training as a user runs it: several processes, resuming, logging, validating."""

import json
import os
import shutil

import numpy as np
import pytest

from tests.plugins.conftest import (
    METRO,
    NO_DROPOUT,
    ROOT,
    T5,
    TINY,
    assert_equal_runs,
    load,
    run,
    write_corpus,
)
from tests.training.kept import COUNTED, FEW, NEW_PAGES, ONCE, new_pages, of_glibc

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


@pytest.mark.slow
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
        "criterion.masked_positions_only=lm criterion.rtd_loss_weight=50 task.mask_prob=0.15",
        "model.init_token_std=null",
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
    """Shards of 4 and 3 updates, so it stops in the first shard or in the second.

    Joined by colons, and in a folder that lists them as `metro prepare-text --shards` does.
    """
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, num_documents in zip(folders, (16, 11), strict=True):
        write_corpus(folder, num_documents)
    data = os.pathsep.join(map(str, folders))
    if stop == 6:
        data = tmp_path
        (data / "prepare_text.json").write_text('{"shards": ["first", "second"]}')
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


@of_glibc
def test_training_keeps_its_memory(corpus, tmp_path):
    """As that of `metro pretrain`; oracle: the pages that the system gave."""
    argv = [*TINY, *METRO, "--max-update 1 --save-dir", str(tmp_path)]
    code = COUNTED + "from fairseq_cli.train import cli_main; cli_main()" + ONCE + NEW_PAGES
    assert new_pages(code, corpus, *" ".join(argv).split()) < FEW
