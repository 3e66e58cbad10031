"""Updates of a run: batches, processes, precision, numbers that are not finite, stops."""

import os
import signal
from pathlib import Path

import pytest
import torch

from metro.finetuning.run import finetune
from metro.finetuning.trainer import FinetuningTrainer
from metro.training.output_folder import TRAINER_STATE, complete_checkpoints
from metro.utils.files import read_json
from metro.utils.messages import UserError
from tests.finetuning.conftest import assert_same, weights
from tests.processes import METRO, run_python


def test_accumulated_micro_batches_are_one_batch(settings):
    """Oracle: the same examples in one batch. The loss is a mean over all of an update's tokens."""
    common = dict(objective="flipped", dropout=0.0, batching="random", max_steps=5, optimizer="sgd")
    one = finetune(settings("one", **common, batch_size=16))
    four = finetune(settings("four", **common, batch_size=4, gradient_accumulation_steps=4))
    assert_same(one.folder, four.folder, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_two_processes_train_the_model_of_one(settings, tmp_path, mean):
    """Oracle: one process that accumulates what the two do; torchrun on the CPU."""
    common = dict(objective="flipped", dropout=0.0, batching="random", max_steps=6, mean=mean)
    common |= dict(eval_steps=6, optimizer="sgd", learning_rate=0.1)
    one = finetune(settings("one", **common, batch_size=4, gradient_accumulation_steps=2))
    use_cpu = torch.accelerator.is_available()  # where there is none, it needs no saying
    options = settings("two", **common, batch_size=4, use_cpu=use_cpu).as_dict()
    (tmp_path / "two.yaml").write_text(
        "".join(f"{k}: {v}\n" for k, v in options.items() if v is not None and k != "adam_betas")
    )
    command = [*"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    command += [*METRO, "finetune", "--config", str(tmp_path / "two.yaml")]
    done = run_python(*command, env={"OMP_NUM_THREADS": "1"})
    assert_same(one.folder, tmp_path / "two", rtol=1e-4, atol=1e-5)
    shown = [line for line in done.stderr.splitlines() if "eval_loss" in line]
    assert len(shown) == 1  # one process speaks
    value = float(shown[0].split("eval_loss ")[1].split()[0])
    assert value == pytest.approx(one.metrics["eval_loss"], rel=1e-3)


def test_bf16_and_gradient_checkpointing_run(settings):
    for name, objective in (("a", "flipped"), ("b", "direct+ul")):
        chosen = settings(
            name, objective=objective, precision="bf16", gradient_checkpointing=True, max_steps=3
        )
        result = finetune(chosen)
        assert result.num_updates == 3
        assert all(t.dtype == torch.float32 for t in weights(result.folder).values())


def test_gradient_checkpointing_changes_no_number(settings):
    # not Adafactor, whose steps have one size however small a gradient and its rounding are
    common = dict(objective="flipped", dropout=0.0, max_steps=4, optimizer="sgd")
    plain = finetune(settings("plain", **common))
    saving = finetune(settings("saving", **common, gradient_checkpointing=True))
    assert_same(plain.folder, saving.folder, rtol=1e-5, atol=1e-6)


def test_tensorboard_has_the_logged_numbers(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = finetune(settings(objective="flipped", report_to="tensorboard", eval_steps=12))
    (events,) = result.folder.glob("runs/*/events*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    names = "loss likelihood unlikelihood right_prob wrong_prob ranked_right padding_share"
    assert {f"train/{name}" for name in names.split()} <= tags
    assert {"eval/loss", "eval/ranked_right"} <= tags


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", "the loss is (nan|inf) after update 4: the training diverged"),
        ("weights", "the weight .* of the model has numbers that are not finite"),
        ("held-out", "the loss on held-out examples is (nan|inf) after update 2, first in a batch"),
    ],
)
def test_a_training_that_diverges_stops_and_writes_no_nan(settings, what, message):
    """Oracle: a learning rate of 1e30; the message, and what lies in the folder."""
    options = {"loss": {}, "weights": {"logging_steps": 50, "save_steps": 2}}
    options["held-out"] = {"logging_steps": 50, "eval_steps": 1}
    huge = dict(optimizer="sgd", learning_rate=1e30, max_grad_norm=0.0, max_steps=6)
    with pytest.raises(UserError, match=message):
        finetune(settings(**huge, **options[what]))
    out = Path(settings().output_dir)
    assert {path.name for path in out.iterdir()} <= {"finetune.yaml", "inputs.json", "runs"}


@pytest.mark.parametrize(
    ("training", "batch", "before"),
    [(True, 2, 0), (True, 22, 5), (False, 2, 4)],
    ids=["in the first update", "between micro-batches", "in an evaluation"],
)
def test_a_stop_is_at_once_and_the_resumed_run_is_bit_exact(
    settings, monkeypatch, training, batch, before
):
    """SIGTERM; four micro-batches, dropout. Oracle: a run left alone; the batches counted."""
    common = dict(gradient_accumulation_steps=4, batch_size=4, dropout=0.1, max_steps=8)
    common |= dict(eval_steps=4, eval_batch_size=2, logging_steps=1, save_steps=100)
    whole = finetune(settings("whole", **common))
    seen = []
    loss = FinetuningTrainer._loss

    def count_and_stop(self, *args):
        seen.append(self.model.training)
        if seen.count(training) == batch and seen[-1] == training:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args)

    stopped = settings("stopped", **common)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuningTrainer, "_loss", count_and_stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(stopped)
    assert seen.count(training) == batch
    checkpoints = [path.name for path in complete_checkpoints(Path(stopped.output_dir))]
    assert checkpoints == ([f"checkpoint-{before}"] if before else [])
    resumed = finetune(stopped)
    assert_same(whole.folder, resumed.folder)
    losses = [
        [line["loss"] for line in read_json(run.folder / TRAINER_STATE)["log_history"][:-1]
         if "loss" in line]
        for run in (whole, resumed)
    ]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 8
