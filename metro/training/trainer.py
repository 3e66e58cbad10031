"""Hugging Face's Trainer as METRO's commands use it; imported for training only.

Batches, their distribution over processes, the loss and sharding are METRO's; updates, mixed
precision, checkpoints, resuming and logging are the Trainer's.
"""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Adafactor, Trainer, TrainerCallback, TrainerControl
from transformers.trainer import (
    DEFAULT_PROGRESS_CALLBACK,  # another one in a notebook
    SCHEDULER_NAME,
)
from transformers.trainer_callback import PrinterCallback

from metro.conversion.export import whole_state
from metro.sharding import SHARDS, local, whole
from metro.training.adafactor import ShardedAdafactor
from metro.training.memory import Heap
from metro.training.sharding import is_sharded, load_shards, save_shards
from metro.training.stopping import StopCallback
from metro.utils.checksums import record
from metro.utils.identity import refuse_not_finite
from metro.utils.messages import UserError
from metro.utils.progress import SILENT, Progress
from metro.utils.stopping import Stop

DIVERGED = (
    "the training diverged, or the model overflows; what was saved before stays: use a lower "
    "learning rate, or bf16 or fp32"
)


class Stopped(Exception):
    """Training ends without another update."""


class MetroTrainer(Trainer):
    """A Trainer that shows progress, stops when it is asked to, and keeps no bad numbers.

    A model that is sharded already stays as it is; ``saves_shards`` writes sharded checkpoints.
    """

    control: TrainerControl
    shown: tuple[str, ...] = ("loss", "grad_norm", "learning_rate")
    """Numbers of a line on the console, in this order."""

    def __init__(
        self,
        model,
        args,
        *,
        progress: Progress = SILENT,
        stop: Stop | None = None,
        saves_shards: bool = False,
        **options,
    ):
        self.progress, self.saves_shards = progress, saves_shards
        self.stop = stop or Stop()
        self.stopping = StopCallback(self.stop)
        self.console = ConsoleCallback(progress, self.shown)
        callbacks = [self.console, self.stopping]
        if args.device.type == "cpu":
            callbacks.append(HeapCallback())
        super().__init__(model, args, callbacks=callbacks, **options)
        # Not for transformers alone: then the Trainer does not wrap the model for processes again.
        self.is_distributed_loading_by_transformers = is_sharded(model)
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = True  # losses are divided by all items of an update

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum in place, over all processes."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)
        return values

    def count_items(self, number: float) -> float:
        """Sum the items of an update over all processes, which tell each other to stop, too."""
        both = torch.tensor([number, float(self.stop.requested_here)], device=self.args.device)
        total, num_requests = self.sum_over_processes(both).tolist()
        self.stop.agreed = self.args.world_size > 1 and bool(num_requests)
        return total

    @functools.cached_property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def floating_point_ops(self, inputs) -> int:
        """Estimate a forward and backward pass as 6 operations per parameter and token."""
        return 6 * inputs["num_tokens"] * self.num_parameters

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log finite numbers; a loss has to be one."""
        if not math.isfinite(loss := logs.get("loss", 0.0)):
            raise UserError(f"the loss is {loss} after update {self.state.global_step}: {DIVERGED}")
        # A gradient that overflows in fp16 is skipped by the Trainer, and JSON has no infinity.
        finite = {name: value for name, value in logs.items() if math.isfinite(value)}
        super().log(finite, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Save, but never weights that are not finite in place of good ones."""
        when = f"after update {self.state.global_step}"
        for name, weight in self.model.named_parameters():
            refuse_not_finite(name, local(weight), f"{when}: {DIVERGED}")
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            names = {path.name for path in folder.iterdir() if path.is_file()}
            # Other processes write theirs at the same time.
            record(folder, {name for name in names if not name.startswith("rng_state_")})

    # --- sharding ---

    def whole_state(self) -> dict[str, torch.Tensor] | None:
        """Gather all weights, in all processes at once; the first has them, the others None."""
        if self.is_deepspeed_enabled:
            try:
                state = self.accelerator.get_state_dict(self.deepspeed)
            except ValueError as error:  # of stage 3, without its setting for this
                raise UserError(f"DeepSpeed cannot join the weights: {error}") from None
        else:
            state = whole_state(self.model)
        return state if self.args.process_index == 0 else None

    def _move_model_to_device(self, model, device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        is_adafactor = kind is Adafactor and is_sharded(model)
        return (ShardedAdafactor if is_adafactor else kind), options

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # after each micro-batch: gradients are never whole

    def _get_grad_norm(self, model, grad_norm=None):
        return whole(super()._get_grad_norm(model, grad_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.saves_shards:
            super().save_model(output_dir, _internal_call)
        elif output_dir:
            Path(output_dir).mkdir(exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.saves_shards:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_shards(Path(output_dir, SHARDS), self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if Path(resume_from_checkpoint, SHARDS).is_dir():
            return  # weights come with the optimizer's states
        if is_sharded(self.model):
            raise UserError(
                f"{resume_from_checkpoint} was saved without --fsdp: go on without it, or train "
                "into another --output-dir from its weights"
            )
        self._load_whole(resume_from_checkpoint, model)

    def _load_whole(self, checkpoint, model=None) -> None:
        """Load weights of a checkpoint that is not sharded."""
        super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (shards := Path(checkpoint, SHARDS)).is_dir():
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_shards(shards, self.model, self.optimizer.optimizer)
        state = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _load_best_model(self) -> None:
        shards = Path(self.state.best_model_checkpoint or "", SHARDS)
        if shards.is_dir():
            load_shards(shards, self.model)
        else:
            super()._load_best_model()


class HeapCallback(TrainerCallback):
    """Gives back what updates leave of the heap."""

    def __init__(self):
        self.heap = Heap()

    def on_step_end(self, args, state, control, **kwargs):
        self.heap.tidy()

    def on_train_end(self, args, state, control, **kwargs):
        self.heap.give_back()


class ConsoleCallback(TrainerCallback):
    """Shows one line per logging step: update and the most important numbers."""

    def __init__(self, progress: Progress, shown: tuple[str, ...]):
        self.progress, self.shown = progress, shown

    def on_train_begin(self, args, state, control, **kwargs):
        place = f"from update {state.global_step} " if state.global_step else ""
        self.progress.say(f"training {place}to update {state.max_steps}")
        self.progress.show("training", state.global_step, state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        self.micro_batches = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1
        self.show_micro_batch(state, self.micro_batches, args.gradient_accumulation_steps)

    def show_micro_batch(self, state, done: int, total: int) -> None:
        """Show the place within an update."""
        note = f"update {state.global_step + 1}, micro-batch {done + 1} of {total}"
        self.progress.show("training", state.global_step + done / total, state.max_steps, note)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.show("training", state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = [f"{name} {_short(logs[name])}" for name in self.shown if name in (logs or {})]
        if numbers:
            left = self.progress.time_left("training", state.global_step, state.max_steps)
            left = f" ({left} left)" if left else ""
            self.progress.say(
                f"update {state.global_step}/{state.max_steps}{left}  {'  '.join(numbers)}"
            )


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
