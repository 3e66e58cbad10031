"""Prompt finetuning through fairseq, against the original's recorded epochs, losses and updates.

Oracle: ``golden/prompt_finetune.json`` and ``.npz``.
"""

import json

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from metro.conversion.fairseq_names import metro_name
from tests.plugins.conftest import ROOT

TINY = [
    "--task t5_prompt_finetuning --arch transformer_t5_base_rpe --tokens-per-sample 128",
    "--criterion label_smoothed_cross_entropy --report-accuracy",
    "--encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-layers 2",
    "--encoder-attention-heads 4 --max-positions 1024 --dropout 0 --attention-dropout 0",
    "--truncate-source --truncate-target --max-tokens 512 --required-batch-size-multiple 1",
    "--optimizer adam --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 0.01 --lr 0.001",
    "--lr-scheduler polynomial_decay --warmup-updates 1 --total-num-update 10",
    "--seed 1 --num-workers 0 --cpu --no-epoch-checkpoints --log-format json --log-interval 1",
    f"--user-dir {ROOT / 'fairseq_plugins'}",
]
MODELS = {"metro_tiny_a": "--clip-norm 0", "metro_tiny_r": "--clip-norm 1.0 --update-freq 2"}


def configure(data, *arguments: str):
    import fairseq_plugins  # noqa: F401

    parts = [part for argument in [*TINY, *arguments] for part in argument.split()]
    args = options.parse_args_and_arch(options.get_training_parser(), [str(data), *parts])
    return convert_namespace_to_omegaconf(args)


@pytest.fixture(scope="module")
def recorded(testdata_module) -> dict:
    return json.loads((testdata_module / "golden/prompt_finetune.json").read_text())


@pytest.fixture(scope="module")
def testdata_module(request):
    return request.getfixturevalue("testdata")


@pytest.fixture(scope="module")
def data(testdata_module):
    return testdata_module / "golden/prompt_T0-bin"


def build(data, testdata, name: str, *arguments: str):
    """Task and trainer, started from a pretraining checkpoint as `--finetune-from-model` does."""
    checkpoint = testdata / f"golden/checkpoints/{name}.pt"
    cfg = configure(data, f"--finetune-from-model {checkpoint}", "--save-dir unused", *arguments)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    task.load_dataset("train")
    _, iterator = checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)
    return task, trainer, iterator


def examples(dataset, batches) -> list[list[int]]:
    return [dataset.collater([dataset[i] for i in batch])["id"].tolist() for batch in batches]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_order_and_batches_of_an_epoch_equal_the_original(data, recorded, epoch):
    want = recorded["epochs"][f"epoch{epoch}"]
    task = tasks.setup_task(configure(data).task)
    task.load_dataset("train")
    dataset = task.dataset("train")
    iterator = task.get_batch_iterator(
        dataset, max_tokens=512, seed=1, epoch=epoch, max_positions=task.max_positions()
    )
    assert dataset.ordered_indices().tolist() == want["ordered_indices"]
    assert [batch.tolist() for batch in iterator.frozen_batches] == want["frozen_batches"]
    batches = [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=True)]
    assert batches == want["batches_in_training_order_sample_ids"]


def test_epochs_of_a_running_iterator_move_the_window(data, recorded):
    """As training does: one task, epoch after epoch, with a process that loads."""
    task = tasks.setup_task(configure(data).task)
    task.load_dataset("train")
    for epoch in (1, 2, 3):
        iterator = task.get_batch_iterator(
            task.dataset("train"), max_tokens=512, seed=1, epoch=epoch, num_workers=1
        )
        batches = [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=True)]
        want = recorded["epochs"][f"epoch{epoch}"]["batches_in_training_order_sample_ids"]
        assert batches == want


def test_validation_groups_equal_the_original(data, recorded):
    task = tasks.setup_task(configure(data).task)
    task.load_dataset("valid_both")
    dataset = task.dataset("valid_both")
    assert len(dataset) == recorded["valid_both"]["len"]
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_tokens=512)
    assert examples(dataset, batches) == recorded["valid_both"]["batches_sample_ids"]
    task.load_dataset("valid_yesno")
    task.load_dataset("valid")
    assert [len(task.dataset(f"valid{group}")) for group in ("_yesno", "")] == [8, 20]


def test_padded_batches_equal_the_original(testdata, data):
    arrays = np.load(testdata / "golden/prompt_finetune.npz")
    task = tasks.setup_task(configure(data).task)
    task.load_dataset("train")
    iterator = task.get_batch_iterator(task.dataset("train"), max_tokens=512, seed=1, epoch=1)
    for number, batch in enumerate(iterator.next_epoch_itr(shuffle=True)):
        prefix = f"epoch1_batch{number}_"
        for name, tensor in {**batch["net_input"], **batch}.items():
            if prefix + name in arrays:
                np.testing.assert_array_equal(tensor.numpy(), arrays[prefix + name], name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_the_original(testdata, data, recorded, name, smoothing):
    """All batches of epoch 1 at the pretrained weights, without the auxiliary model."""
    task, trainer, iterator = build(data, testdata, name, f"--label-smoothing {smoothing}")
    assert trainer.model.model.config.decoder_start_token_id == 2
    runs = recorded["runs"][name]["eval_mode_losses_epoch1_batches_at_initial_weights"]
    runs = {run["batch"]: run for run in runs if run["label_smoothing"] == smoothing}
    assert len(runs) == 5
    trainer.model.eval()
    for number, batch in enumerate(iterator.next_epoch_itr(shuffle=True)):
        with torch.no_grad():
            _, sample_size, logged = trainer.criterion(trainer.model, batch)
        want = runs[number]["logging_output"]
        assert sample_size == want["sample_size"]
        for key, value in want.items():
            assert float(logged[key]) == pytest.approx(value, rel=1e-5), (number, key)


@pytest.mark.parametrize("name", MODELS)
def test_updates_equal_the_original(testdata, data, recorded, name):
    """Batches, learning rate, and each parameter's sum and norm after each of 8 updates."""
    run = recorded["runs"][name]
    smoothing = run["settings"]["label_smoothing"]
    task, trainer, iterator = build(
        data, testdata, name, f"--label-smoothing {smoothing}", MODELS[name]
    )
    updates = iter(run["updates"])
    done = 0
    while done < len(run["updates"]):
        groups = iterator.next_epoch_itr(shuffle=True)
        if trainer.cfg.optimization.update_freq[0] > 1:
            from fairseq.data.iterators import GroupedIterator

            groups = GroupedIterator(groups, 2)
        else:
            groups = ([batch] for batch in groups)
        for group in groups:
            want = next(updates, None)
            if want is None:
                return
            assert [batch["id"].tolist() for batch in group] == [m["ids"] for m in want["micro"]]
            assert trainer.get_lr() == pytest.approx(want["lr_used"])
            trainer.train_step(group)
            check_weights(trainer, want["param_sum_and_norm_after"])
            done += 1
        iterator = trainer.get_train_iterator(iterator.next_epoch_idx, load_dataset=False)


def check_weights(trainer, recorded: dict) -> None:
    for name, (total, norm) in recorded.items():
        ours = metro_name(name).removeprefix("main.")
        weight = trainer.model.model.get_parameter(ours).detach().double()
        if name.endswith(
            "k_proj.bias"
        ):  # gradient zero in theory: rounding noise, made large by Adam
            continue
        assert float(weight.norm()) == pytest.approx(norm, rel=1e-4), name
        scale = float(weight.abs().sum())
        assert float(weight.sum()) == pytest.approx(total, abs=2e-5 * scale), name
