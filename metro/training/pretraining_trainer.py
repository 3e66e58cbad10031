"""The Trainer with the data and losses of pretraining; imported for training only.

A step of the Trainer is an update: its batches are cut by tokens and their number differs, so the
micro-batches of an update come together from `metro.pretraining.batches`, and `training_step` goes
through them. Epochs, their order and the place to resume at are those of the data, not the
Trainer's. As in fairseq every update seeds dropout by itself, so that a resumed run is bit for bit
the one that was not stopped.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from metro.pretraining.batches import (
    START,
    MicroBatch,
    Position,
    Update,
    num_items,
    num_text_tokens,
)
from metro.pretraining.building import objective
from metro.pretraining.dataset import Batch
from metro.pretraining.loss_guard import LossGuard
from metro.pretraining.losses import MetroLosses, T5Losses
from metro.pretraining.metrics import SUMS, T5_SUMS, summarized
from metro.pretraining.optimization import build_optimizer, build_schedule
from metro.pretraining.settings import PretrainingSettings
from metro.training.output_folder import complete_checkpoints, last_metrics
from metro.training.pretraining_files import load_weights, write_model
from metro.training.trainer import MetroTrainer, Stopped
from metro.utils.files import write_json
from metro.utils.messages import UserError

POSITION = "position.json"
REFERENCES = ("unigram_bits", "bigram_bits", "trigram_bits")
NOT_INPUTS = ("indices", "lengths", "num_tokens", "num_target_tokens", "num_text_tokens")
"""Fields of a batch that the models do not take."""


class PretrainingTrainer(MetroTrainer):
    """Trains METRO's or T5's pretraining model on `Updates`.

    Args:
        model: of `metro.pretraining.model`.
        args: the Trainer's own options.
        settings: resolved ones.
        updates: the updates of this process.
        valid: makes the validation batches of this process; None: no validation.
        reference_bits: of n-gram models, logged with the validation losses.
    """

    shown = (
        *("loss", "generator_loss", "discriminator_loss", "rtd_loss", "replace_ratio", "accuracy"),
        *("rtd_label_entropy", "grad_norm", "learning_rate", "wps", "valid_loss"),
        *("valid_generator_loss", "valid_discriminator_loss", "valid_rtd_loss", "valid_accuracy"),
        *(f"valid_{name}" for name in REFERENCES),
    )

    def __init__(
        self,
        model,
        args,
        *,
        settings: PretrainingSettings,
        updates: Iterable[Update],
        position: Position = START,
        valid=None,
        reference_bits: Mapping[str, float] | None = None,
        **options,
    ):
        self.settings, self.updates, self.valid = settings, updates, valid
        self.position = position
        self.reference_bits = reference_bits or {}
        self.fields = SUMS if settings.is_metro else T5_SUMS
        self.loss_options: dict[str, Any] = {"label_smoothing": settings.label_smoothing}
        if settings.is_metro:
            self.loss_options = {"objective": objective(settings)}
        self.guard = LossGuard()
        self.sums: dict[str, torch.Tensor] = {}
        self.num_tokens, self.since = 0, time.monotonic()
        self.last_valid: dict[str, float] = {}
        super().__init__(model, args, **options)
        self.add_callback(ValidateCallback(settings, valid is not None))
        # Before all others, which act on the number of updates.
        self.callback_handler.callbacks.insert(0, OverflowCallback(self))

    # --- data ---

    def get_train_dataloader(self) -> Any:
        return iter(self.updates)  # one iterator: an update that is skipped takes one more

    def get_batch_samples(self, epoch_iterator, num_batches, device=None):
        """Return the next update, and the number of its items in all processes.

        Raises:
            Stopped: there is none, as an earlier run ended before it had written the model.
        """
        if self.state.global_step >= self.state.max_steps:
            last = last_metrics(self.state.log_history).items()
            self.last_valid = {k[6:]: value for k, value in last if k.startswith("valid_")}
            raise Stopped
        update: Update = next(epoch_iterator)
        own = sum(num_items(micro.batch, self.settings) for micro in update[0] if micro.counts)
        return [update], self.count_items(float(own))

    # --- updates ---

    def training_step(self, model, inputs: Update, num_items_in_batch=None) -> torch.Tensor:  # type: ignore[override]
        """Add up the gradients of an update.

        Raises:
            Stopped: a request to stop came within it, and no other process waits for this one.
        """
        model.train()
        self.counted = dict(self.sums), self.num_tokens
        torch.manual_seed(self.settings.seed + self.state.global_step)
        total = torch.zeros((), device=self.args.device)
        self.guard.clear()
        last = len(inputs.micro_batches) - 1
        for i, micro in enumerate(inputs.micro_batches):
            if self.args.world_size == 1 and self.stop.requested_here:
                raise Stopped
            self.accelerator.gradient_state._set_sync_gradients(i == last)  # for DeepSpeed
            waits = contextlib.nullcontext() if i == last else self.accelerator.no_sync(model)
            with waits, self.compute_loss_context_manager():
                losses = self.losses(model, micro.batch)
                self.guard.watch(losses.total, micro.batch.indices)
                loss = losses.total * (self.args.world_size / max(num_items_in_batch or 0.0, 1.0))
                self.accelerator.backward(loss if micro.counts else loss * 0.0)
            if micro.counts:
                total += loss.detach()
                self.add(self.sums, losses, micro)
            if i < last:
                self.console.show_micro_batch(self.state, i + 1, last + 1)
        try:
            self.guard.check(self.state.global_step)
        except FloatingPointError as error:
            raise UserError(str(error)) from None
        self.position = inputs.after
        return total

    def losses(self, model, batch: Batch) -> MetroLosses | T5Losses:
        """Compute the losses of a batch."""
        inputs = {k: v for k, v in batch._asdict().items() if k not in NOT_INPUTS}
        return model(**self._prepare_inputs(inputs), **self.loss_options)

    def add(self, sums: dict[str, torch.Tensor], losses, micro: MicroBatch) -> None:
        """Add what is logged of a batch."""
        for name, field in self.fields.items():
            sums[name] = sums.get(name, 0) + getattr(losses, field).detach().double()
        self.num_tokens += num_text_tokens(micro.batch)

    def floating_point_ops(self, inputs: Update) -> int:  # type: ignore[override]
        tokens = sum(num_text_tokens(micro.batch) for micro in inputs.micro_batches)
        return super().floating_point_ops({"num_tokens": tokens})

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = build_optimizer((model or self.model).parameters(), self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler: Any = build_schedule(optimizer or self.optimizer, self.settings)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def skip_update(self) -> None:
        """Count an update whose gradient overflowed in fp16 as none, as fairseq does."""
        self.state.global_step -= 1
        self.sums, self.num_tokens = self.counted
        number = self.state.global_step + 1
        self.progress.say(f"the gradient of update {number} overflows in fp16: skipped")

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        control = self.control
        if self.accelerator.optimizer_step_was_skipped and not control.should_training_stop:
            control.should_log = control.should_save = control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # --- logging and validation ---

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with the published metrics over everything since the last line of training."""
        self.state.epoch = self.position.epoch - 1 + self.position.done / max(self.position.of, 1)
        if "loss" in logs:  # in all processes, also where no batch of this one counted
            speed = torch.tensor([float(self.num_tokens)], device=self.args.device)
            now = time.monotonic()
            wps = self.sum_over_processes(speed).item() / max(now - self.since, 1e-6)
            logs = {**logs, **self.summary(self.sums), "wps": round(wps, 1)}
            self.sums, self.num_tokens, self.since = {}, 0, now
        super().log(logs, *args, **kwargs)

    def summary(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Compute the metrics over all processes with one transfer."""
        zero = torch.zeros((), dtype=torch.float64, device=self.args.device)
        values = torch.stack([torch.as_tensor(sums.get(name, zero)) for name in self.fields])
        found = self.sum_over_processes(values.to(self.args.device)).tolist()
        return summarized(dict(zip(self.fields, found, strict=True)))

    @torch.no_grad()
    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "valid"
    ) -> dict[str, float]:
        """Compute the losses on the validation text, the same in every epoch."""
        assert self.valid is not None
        self.model.eval()
        sums: dict[str, torch.Tensor] = {}
        tokens, began = self.num_tokens, time.monotonic()
        for done, micro in enumerate(self.valid()):
            if self.args.world_size == 1 and self.stop.requested_here:
                self.stopping.save_and_stop(self.args, self.state, self.control)
                return {}
            self.progress.show("validating", done)
            with self.compute_loss_context_manager():  # where it does not count, too: sharded
                losses = self.losses(self.model, micro.batch)  # weights are gathered by all
            if micro.counts:
                self.add(sums, losses, micro)
        self.num_tokens, self.since = tokens, self.since + time.monotonic() - began
        found = {**self.summary(sums), **self.reference_bits}
        self.last_valid = found
        metrics = {f"valid_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # --- checkpoints ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a Hugging Face folder with the auxiliary model, and the place in the data."""
        if self.args.should_save:
            out = Path(output_dir or str(self.args.output_dir))
            if out.exists():  # of a run that was killed while it saved
                shutil.rmtree(out)
            if self.saves_shards or self.is_deepspeed_enabled:
                out.mkdir(exist_ok=True)
            else:
                self.write(out, self.model.state_dict(), keep_auxiliary=True)
            write_json(out / POSITION, self.position._asdict())
        self.accelerator.wait_for_everyone()  # to write into it

    def write(self, out: Path, state: Mapping[str, torch.Tensor], keep_auxiliary: bool) -> None:
        """Write the model with these weights as a Hugging Face folder."""
        done = self.state.global_step
        write_model(self.model, state, self.settings, out, done, self.last_valid, keep_auxiliary)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            drop_old_checkpoints(Path(str(self.args.output_dir)), self.settings)

    def save_now(self) -> None:
        """Save after the last update, unless that is done."""
        saved = {path.name for path in complete_checkpoints(Path(str(self.args.output_dir)))}
        if self.state.global_step and f"checkpoint-{self.state.global_step}" not in saved:
            self._save_checkpoint(self.model_wrapped, None)

    def _load_whole(self, checkpoint, model=None) -> None:
        load_weights(self.model, Path(checkpoint), self.settings)

    def _save_rng_state(self, output_dir) -> None:
        """Save nothing: every update seeds by itself."""

    def _load_rng_state(self, checkpoint) -> None:
        """Load nothing, see above."""


class OverflowCallback(TrainerCallback):
    """Takes back an update that the Trainer counted although it was skipped."""

    def __init__(self, trainer: PretrainingTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.skip_update()


class ValidateCallback(TrainerCallback):
    """Validates where a checkpoint is saved, at the end, and where the settings say."""

    def __init__(self, settings: PretrainingSettings, can_validate: bool):
        self.every, self.can_validate = settings.validate_interval_updates, can_validate

    def on_step_end(self, args, state, control, **kwargs):
        is_due = self.every and state.global_step % self.every == 0
        is_last = state.global_step >= state.max_steps
        if self.can_validate and (is_last or not control.should_training_stop):  # not at a request
            control.should_evaluate = bool(is_due or is_last or control.should_save)


def drop_old_checkpoints(out: Path, settings: PretrainingSettings) -> None:
    """Delete checkpoints but the newest ones, and those of every so many updates, as fairseq."""
    number, pattern = settings.keep_interval_updates, settings.keep_interval_updates_pattern
    if number <= 0:
        return
    paths = complete_checkpoints(out)
    if pattern > 0:
        paths = [path for path in paths if int(path.name.split("-")[1]) % pattern]
    for path in paths[:-number]:
        shutil.rmtree(path)
