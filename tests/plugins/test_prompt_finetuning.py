"""Prompt finetuning through fairseq, against the original's recorded epochs, losses and updates.

Oracle: ``golden/prompt_finetune.json`` and ``.npz``.
"""

import json

import numpy as np
import pytest
import torch
import yaml
from fairseq import checkpoint_utils, optim, tasks, utils
from fairseq.data.iterators import GroupedIterator
from fairseq.trainer import Trainer

from fairseq_plugins.models._options import metro_t5_config
from metro.finetuning.losses import LossOptions, batch_loss
from metro.models.fairseq_names import metro_name
from metro.utils.messages import UserError
from tests.finetuning.prepared import write_prepared
from tests.plugins import conftest, test_models
from tests.plugins.conftest import ROOT, Result, assert_equal_runs, load

TINY = [
    "--task t5_prompt_finetuning --arch transformer_t5_base_rpe --tokens-per-sample 128",
    "--encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-layers 2",
    "--encoder-attention-heads 4 --max-positions 1024 --dropout 0 --attention-dropout 0",
    "--truncate-source --truncate-target --max-tokens 512 --required-batch-size-multiple 1",
    "--optimizer adam --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 0.01 --lr 0.001",
    "--lr-scheduler polynomial_decay --warmup-updates 1 --total-num-update 10",
    "--seed 1 --num-workers 0 --cpu --no-epoch-checkpoints --log-format json --log-interval 1",
    f"--user-dir {ROOT / 'fairseq_plugins'}",
]
DIRECT = "--criterion label_smoothed_cross_entropy --report-accuracy"
MODELS = {"metro_tiny_a": "--clip-norm 0", "metro_tiny_r": "--clip-norm 1.0 --update-freq 2"}


def configure(data, *arguments: str):
    has_criterion = any("--criterion" in argument for argument in arguments)
    return conftest.configure(data, *TINY, *([] if has_criterion else [DIRECT]), *arguments)


@pytest.fixture(scope="module")
def recorded(golden) -> dict:
    return json.loads((golden / "prompt_finetune.json").read_text())


@pytest.fixture(scope="module")
def data(golden):
    return golden / "prompt_T0-bin"


def build(data, golden, name: str, *arguments: str):
    """Task and trainer, started from a pretraining checkpoint as `--finetune-from-model` does."""
    checkpoint = golden / f"checkpoints/{name}.pt"
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


def test_padded_batches_equal_the_original(golden, data):
    arrays = np.load(golden / "prompt_finetune.npz")
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
def test_losses_equal_the_original(golden, data, recorded, name, smoothing):
    """All batches of epoch 1 at the pretrained weights, without the auxiliary model."""
    task, trainer, iterator = build(data, golden, name, f"--label-smoothing {smoothing}")
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
def test_updates_equal_the_original(golden, data, recorded, name, monkeypatch):
    """Batches, learning rate, and each parameter's sum and norm after each of 8 updates.

    In float64: in float32 rounding puts single pre-activations of ReLU on either side of zero, and
    so decides whether a unit has a gradient, which Adam makes large. With AVX-512 kernels one of
    +3e-8 in place of -2e-7 in the third update moves a sum by 1.5 times the tolerance at the end.
    The recording (float32, AVX2) has the signs of exact arithmetic: within 0.12 of the tolerance.
    """
    run = recorded["runs"][name]
    smoothing = run["settings"]["label_smoothing"]
    task, trainer, iterator = build(
        data, golden, name, f"--label-smoothing {smoothing}", MODELS[name]
    )
    trainer.model.double()
    monkeypatch.setattr(utils, "clip_grad_norm_", clip_grad_norm_of_any_type)
    updates = iter(run["updates"])
    done = 0
    while done < len(run["updates"]):
        groups = iterator.next_epoch_itr(shuffle=True)
        if trainer.cfg.optimization.update_freq[0] > 1:
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


def clip_grad_norm_of_any_type(params, max_norm, aggregate_norm_fn=None) -> torch.Tensor:
    """fairseq's adds up norms in float32 and refuses others."""
    return torch.nn.utils.clip_grad_norm_(params, max_norm or torch.inf)


def check_weights(trainer, recorded: dict) -> None:
    for name, (total, norm) in recorded.items():
        ours = metro_name(name).removeprefix("main.")
        weight = trainer.model.model.get_parameter(ours).detach().double()
        if name.endswith("k_proj.bias"):  # gradient zero but for rounding, made large by Adam
            continue
        assert float(weight.norm()) == pytest.approx(norm, rel=1e-4), name
        scale = float(weight.abs().sum())
        assert float(weight.sum()) == pytest.approx(total, abs=2e-5 * scale), name


# --- whole runs ---

SMALL = "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-layers 1 --max-positions 128"


@pytest.fixture
def train(run_here):
    """Training of a tiny model: `train(data, save, *options)`."""

    def run_tiny(data, save, *arguments: str) -> Result:
        return run_here(configure(data, f"--save-dir {save}", *arguments))

    return run_tiny


def test_a_resumed_run_over_epochs_is_bit_exact(train, data, tmp_path):
    """11 updates; five or six batches an epoch, another window in each; validation by groups."""
    options = [SMALL, "--dropout 0.1", "--valid-subset valid_yesno,valid_both"]
    whole = train(data, tmp_path / "whole", *options, "--max-update 11")
    train(data, tmp_path / "halves", *options, "--max-update 7")
    train(data, tmp_path / "halves", *options, "--max-update 11")
    last = "checkpoint_last.pt"
    assert_equal_runs(load(tmp_path / "whole" / last), load(tmp_path / "halves" / last))
    assert [line["epoch"] for line in whole.logged("train_inner")] == [1] * 5 + [2] * 6
    assert whole.logged("valid_yesno") and whole.logged("valid_both")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data", 40)


def flipped(golden) -> list[str]:
    checkpoint = golden / "checkpoints/metro_tiny_r.pt"
    return [
        f"--criterion flipped --vocab {golden / 'tiny_vocab'} --batch-size 8",
        f"--finetune-from-model {checkpoint} --lr 0.003 --warmup-updates 3 --total-num-update 400",
    ]


def test_flipped_trains_on_prompts_kept_as_text(train, prompts, golden, tmp_path):
    """The loss falls; all it is made of is logged; a resumed run is bit exact."""
    common = [*flipped(golden), "--dropout 0.1"]
    whole = train(prompts, tmp_path / "whole", *common, "--max-update 16")
    lines = whole.logged("train_inner")
    assert float(lines[-1]["loss"]) < 0.7 * float(lines[0]["loss"])
    for line in lines:
        total = float(line["likelihood"]) + 3 * float(line["unlikelihood"])
        assert float(line["loss"]) == pytest.approx(total, abs=3e-4)
    names = "right_prob wrong_prob right_log_prob wrong_log_prob ranked_right skipped_examples"
    assert set(names.split()) <= lines[0].keys()
    assert whole.logged("valid")
    train(prompts, tmp_path / "halves", *common, "--max-update 7")
    train(prompts, tmp_path / "halves", *common, "--max-update 16")
    last = "checkpoint_last.pt"
    assert_equal_runs(load(tmp_path / "whole" / last), load(tmp_path / "halves" / last))


@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_the_flipped_criterion_is_the_librarys_loss(prompts, golden, mean):
    """Oracle: `batch_loss` on the same batch, which is a mean where the criterion gives a sum."""
    task, trainer, iterator = build(
        prompts, golden, "metro_tiny_r", *flipped(golden)[:1], f"--loss-mean {mean}"
    )
    batch = next(iterator.next_epoch_itr(shuffle=True))
    trainer.model.eval()
    loss, sample_size, _ = trainer.criterion(trainer.model, batch)
    want = batch_loss(
        trainer.model.model,
        LossOptions("flipped", 1, mean),
        batch["net_input"]["src_tokens"],
        batch["target"],
        batch["net_input"]["wrong_source_ids"],
    )
    assert float(loss.detach()) / sample_size == pytest.approx(float(want.total.detach()), rel=1e-5)


def test_the_channel_objective_turns_prompt_and_answer_round(prompts, golden):
    options = f"--vocab {golden / 'tiny_vocab'} --objective"
    sizes = []
    for objective in ("direct", "channel"):
        task = tasks.setup_task(configure(prompts, options, objective).task)
        task.load_dataset("train")
        example = task.dataset("train")[0]
        sizes.append((len(example.source_ids) - 2, len(example.target_ids) - 1))
    assert sizes[0] == sizes[1][::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--objective flipped", "use direct or channel, or the criterion flipped"),
        ("--objective channel", "is binarised; prepare it with"),
        ("--max-source-tokens 129", "max_source_tokens is 129; use 3 to tokens_per_sample .128."),
    ],
)
def test_options_that_make_no_sense_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.setup_task(configure(data, options).task)


def test_the_flipped_criterion_refuses_binarised_data(data):
    cfg = configure(data, "--criterion flipped")
    with pytest.raises(ValueError, match="the criterion flipped needs prompts kept as text"):
        tasks.setup_task(cfg.task).build_criterion(cfg.criterion)


def test_folders_without_what_is_needed_are_refused(data, prompts, tmp_path):
    with pytest.raises(ValueError, match="no dict.txt in"):
        tasks.setup_task(configure(tmp_path).task)
    with pytest.raises(ValueError, match="give the folder of the model's vocabulary"):
        tasks.setup_task(configure(prompts).task)
    task = tasks.setup_task(configure(data).task)
    with pytest.raises(ValueError, match="no group 'maybe' .*use one of valid_yesno, valid_both"):
        task.load_dataset("valid_maybe")
    with pytest.raises(UserError, match="data_cap.json"):
        task.load_dataset("test")


# --- configurations ---

CONFIGS = ROOT / "fairseq_plugins/configs/finetuning"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one_that_fairseq_takes(path, monkeypatch):
    """Every key is known, task, model and criterion exist; an update has the stated examples."""
    monkeypatch.setattr(test_models, "CONFIGS", CONFIGS)
    given = ["task.data=d", "checkpoint.finetune_from_model=m"]
    given += ["task.vocab=v"] * ("flipped" in path.stem)
    cfg = test_models.from_yaml(path.stem, *given)
    task = test_models.TinyDictionaryTask.build()
    config = metro_t5_config(cfg.model, task.source_dictionary)
    assert cfg.task.tokens_per_sample <= config.max_positions
    assert cfg.task._name == "t5_prompt_finetuning"
    text = yaml.safe_load(path.read_text())
    assert cfg.checkpoint.save_dir == f"runs/{path.stem}" == text["checkpoint"]["save_dir"]
    gpus = path.stem.rpartition("_")[2].removesuffix("gpus")
    if gpus.isdigit():
        examples = cfg.dataset.batch_size * cfg.optimization.update_freq[0] * int(gpus)
        assert examples == (240 if "flipped" in path.stem else 1024)
        sizes = (1024, 24) if "large" in path.stem else (768, 12)
        assert (config.d_model, config.num_layers) == sizes


def test_flipped_takes_the_published_optimizer(monkeypatch):
    """Oracle: Adafactor of transformers as FLIPPED's published training calls it, 5e-5 constant."""
    from transformers.optimization import Adafactor

    monkeypatch.setattr(test_models, "CONFIGS", CONFIGS)
    given = ["task.data=d", "task.vocab=v", "checkpoint.finetune_from_model=m"]
    cfg = test_models.from_yaml("flipped_metro_large_8gpus", *given)
    assert cfg.optimization.clip_norm == 0.5
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one = optim.build_optimizer(cfg.optimizer, [ours])
    assert optim.lr_scheduler.build_lr_scheduler(cfg.lr_scheduler, one).step_update(9) == 5e-5
    other = Adafactor([theirs], lr=5e-5, scale_parameter=False, relative_step=False)
    for step in range(3):
        for parameter in (ours, theirs):
            parameter.grad = torch.cos(start * (step + 1))
        one.step()
        other.step()
    assert not torch.equal(ours, start)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
