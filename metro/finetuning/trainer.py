"""Hugging Face's Trainer with METRO's data and losses; imported for training only.

Batches, their distribution over processes and the loss are METRO's; updates, mixed precision,
accumulation, checkpoints, resuming and logging are the Trainer's.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl

from metro.finetuning.batches import EncodedPrompts, EpochBatches, EpochLoader
from metro.finetuning.collation import EncodedPrompt, collate_prompts
from metro.finetuning.data import PromptData
from metro.finetuning.losses import BatchLoss, LossOptions, batch_loss
from metro.finetuning.stopping import StopCallback
from metro.utils.identity import refuse_not_finite
from metro.utils.messages import UserError, shortened
from metro.utils.progress import SILENT, Progress
from metro.utils.stopping import Stop

# logged mean -> (sum, divisor)
MEANS = {
    "likelihood": ("likelihood", "items"),
    "unlikelihood": ("unlikelihood", "items"),
    "token_nll": ("nll", "tokens"),
    "exact_match": ("exact", "examples"),
    "right_log_prob": ("right_log_prob", "examples"),
    "wrong_log_prob": ("wrong_log_prob", "examples"),
    "right_prob": ("right_prob", "examples"),
    "wrong_prob": ("wrong_prob", "examples"),
    "ranked_right": ("ranked_right", "examples"),
    "padding_share": ("padding", "positions"),
}
CUT = ("cut_sources", "cut_targets")
# shown on the console, in this order
SHOWN = (
    *("loss", "likelihood", "unlikelihood", "right_prob", "wrong_prob", "ranked_right"),
    *("exact_match", "grad_norm", "learning_rate", "padding_share", "skipped_examples", *CUT),
    *("eval_loss", "eval_ranked_right", "eval_exact_match", "eval_skipped_examples"),
)


DIVERGED = (
    "the training diverged, or the model overflows; what was saved before stays: use a lower "
    "learning_rate, or precision bf16 or fp32"
)


class FinetuningTrainer(Trainer):
    """Trains on `PromptData` under one objective.

    Logged beside the loss: for flipped and direct+ul both terms (`likelihood`, `unlikelihood`), the
    target's mean probability with the right and with the wrong label (`right_prob`, `wrong_prob`
    and their logarithms) and the share of examples where the right one is greater
    (`ranked_right`); for direct and channel the share of examples with every target token most
    probable (`exact_match`); the share of padding, and the numbers of examples skipped because they
    have no wrong label (`skipped_examples`), and of cut texts (`cut_sources`, `cut_targets`).
    """

    control: TrainerControl

    def __init__(
        self,
        model,
        args,
        *,
        loss_options: LossOptions,
        train_data: PromptData | None = None,
        valid_data: PromptData | None = None,
        batching: str = "length",
        max_width: int | None = None,
        progress: Progress = SILENT,
        stop: Stop | None = None,
        **kwargs,
    ):
        self.loss_options, self.batching, self.max_width = loss_options, batching, max_width
        self.progress = progress
        self.stop = stop or Stop()
        self.stopping = StopCallback(self.stop)
        super().__init__(
            model,
            args,
            train_dataset=None if train_data is None else EncodedPrompts(train_data),
            eval_dataset=None if valid_data is None else EncodedPrompts(valid_data),
            data_collator=self.collate,
            callbacks=[ConsoleCallback(progress), self.stopping],
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the loss below is divided by all items of an update
        self.sums: dict[str, torch.Tensor] = {}
        self.num_skipped = 0
        num_tasks = 0 if train_data is None else len(train_data.examples)
        self.num_cut = torch.zeros(2, num_tasks)  # sources and targets of every task

    # --- data ---

    def collate(self, examples: list[EncodedPrompt | None]) -> dict[str, Any]:
        """Make a batch for the loader; examples that cannot be used are None."""
        usable = [example for example in examples if example is not None]
        num_unusable = len(examples) - len(usable)
        if not usable:
            return {"num_skipped": num_unusable}
        batch = collate_prompts(usable, self.loss_options.pad_token_id, self.max_width)
        return {
            **batch._asdict(),
            "num_examples": len(usable),
            "num_skipped": batch.num_skipped + num_unusable,
        }

    def get_train_dataloader(self) -> EpochLoader:
        dataset = self.train_dataset
        assert isinstance(dataset, EncodedPrompts)
        batches = EpochBatches(
            dataset.data,
            self.args.per_device_train_batch_size,
            seed=self.args.seed,
            batching=self.batching,
            process=self.args.process_index,
            num_processes=self.args.world_size,
        )
        return EpochLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device=None):
        """Return the micro-batches of one update, and the number of items of all processes."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        name = "num_target_tokens" if self.loss_options.mean == "tokens" else "num_examples"
        num_items = float(sum(batch[name] for batch in batches))
        both = torch.tensor([num_items, float(self.stop.requested_here)], device=self.args.device)
        num_items, num_requests = self._sum_over_processes(both)
        self.stop.agreed = self.args.world_size > 1 and bool(num_requests)
        return batches, num_items

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)
        return values

    # --- loss ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self._loss(model, inputs, num_items_in_batch)
        for name, value in loss.sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.num_skipped += inputs["num_skipped"]
        for row, name in enumerate(CUT):
            for task in inputs[name]:
                self.num_cut[row, task] += 1
        # The gradients of the processes are averaged, and num_items_in_batch is of all of them.
        total = loss.total * self.args.world_size
        return (total, None) if return_outputs else total

    def _loss(self, model, inputs: dict[str, Any], num_items) -> BatchLoss:
        objective = self.loss_options.objective
        loss = batch_loss(
            model,
            self.loss_options,
            inputs["source_ids"],
            inputs["target_ids"],
            inputs["wrong_source_ids" if objective == "flipped" else "wrong_target_ids"],
            num_items=num_items,
        )
        items = loss.sums[self.loss_options.mean]
        positions = torch.full_like(items, inputs["num_positions"])
        padding = torch.full_like(items, inputs["num_positions"] - inputs["num_tokens"])
        sums = {**loss.sums, "items": items, "positions": positions, "padding": padding}
        return loss._replace(sums=sums)

    def floating_point_ops(self, inputs) -> int:
        """Estimate a forward and backward pass as 6 operations per parameter and token."""
        return 6 * inputs["num_tokens"] * self._num_parameters

    @functools.cached_property
    def _num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    # --- logging and evaluation ---

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with means over everything since the last line of training."""
        if "loss" in logs and self.sums:
            logs = {**logs, **self._means(self.sums)}
            counts = torch.tensor([float(self.num_skipped), *self.num_cut.sum(1).tolist()])
            totals = self._sum_over_processes(counts.to(self.args.device)).tolist()
            named = zip(("skipped_examples", *CUT), totals, strict=True)
            logs |= {name: int(number) for name, number in named if number}
            self.sums = {}
        if not math.isfinite(loss := logs.get("loss", 0.0)):
            raise UserError(f"the loss is {loss} after update {self.state.global_step}: {DIVERGED}")
        # A gradient that overflows in fp16 is skipped by the Trainer, and JSON has no infinity.
        finite = {name: value for name, value in logs.items() if math.isfinite(value)}
        super().log(finite, *args, **kwargs)

    def say_what_was_cut(self) -> None:
        """Say how many sources and targets of each task were cut since this start."""
        if not isinstance(self.train_dataset, EncodedPrompts):
            return
        data = self.train_dataset.data
        encoder, names = data.encoder, [examples.path.parent.name for examples in data.examples]
        lost = "end" if encoder.truncation_side == "right" else "beginning"
        remarks = (
            f"sources cut at {encoder.max_source_length} tokens, losing the {lost} "
            "(max_input_length and truncation_side change it)",
            f"targets cut at {encoder.max_target_length} tokens (max_target_length changes it)",
        )
        counts = self._sum_over_processes(self.num_cut.to(self.args.device)).int().tolist()
        for remark, numbers in zip(remarks, counts, strict=True):
            cut = [f"{n} of {name}" for name, n in zip(names, numbers, strict=True) if n]
            if cut:
                self.progress.say(f"{remark}: {', '.join(cut)}")

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Save, but never weights that are not finite in place of good ones."""
        for name, weight in self.model.named_parameters():
            refuse_not_finite(name, weight, f"after update {self.state.global_step}: {DIVERGED}")
        super()._save_checkpoint(*args, **kwargs)

    def _means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Compute means over all processes with one transfer."""
        names = sorted(sums)
        values = self._sum_over_processes(torch.stack([sums[name].float() for name in names]))
        found = dict(zip(names, values.tolist(), strict=True))
        return {
            name: round(found[part] / found[whole], 6)
            for name, (part, whole) in MEANS.items()
            if part in found and found.get(whole)
        }

    @torch.no_grad()
    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute loss and means over the validation examples, each once; none where it stops.

        Raises:
            UserError: not a single example can be used.
        """
        dataset = eval_dataset or self.eval_dataset
        assert isinstance(dataset, EncodedPrompts)
        started, skipped = time.time(), 0
        sums: dict[str, torch.Tensor] = {}
        losses: list[tuple[torch.Tensor, list[int]]] = []
        self.progress.say(f"evaluating {len(dataset)} held-out examples")
        self.model.eval()
        longest_first = np.argsort(-dataset.data.lengths(0), kind="stable")
        size, world_size = self.args.per_device_eval_batch_size, self.args.world_size
        for start in range(self.args.process_index * size, len(dataset), world_size * size):
            self.progress.show("evaluating", start, len(dataset))
            if world_size == 1 and self.stop.requested_here:
                self.stopping.save_and_stop(self.args, self.state, self.control)
                return {}
            positions = longest_first[start : start + size].tolist()
            batch = self.collate([dataset[0, position] for position in positions])
            inputs = self._prepare_inputs(batch)
            skipped += inputs["num_skipped"]
            if "source_ids" not in inputs:
                continue
            with self.compute_loss_context_manager():
                loss = self._loss(self.model, inputs, None)
            items = loss.sums["items"]
            losses.append((loss.total, positions))
            for name, value in {**loss.sums, "loss": loss.total * items}.items():
                sums[name] = sums.get(name, 0) + value
        if world_size > 1:
            sums = self._same_keys(sums)
        if not sums:
            raise UserError(
                f"no validation example of {dataset.data.folder} can be used under the objective "
                f"{self.loss_options.objective}; leave eval_steps out, or prepare tasks with "
                "answer choices"
            )
        metrics = self._means(sums)
        parts = torch.stack([sums["loss"], sums["items"], torch.full_like(sums["loss"], skipped)])
        total, num_items, num_skipped = self._sum_over_processes(parts).tolist()
        if not math.isfinite(total):
            bad = next((of for loss, of in losses if not bool(loss.isfinite())), [])
            tasks = shortened(sorted({dataset.data.task_name(position) for position in bad}))
            where = f", first in a batch of {tasks}" if tasks else ""
            raise UserError(
                f"the loss on held-out examples is {total} after update {self.state.global_step}"
                f"{where}: {DIVERGED}"
            )
        metrics |= {
            "loss": total / num_items,
            "skipped_examples": int(num_skipped),
            "runtime": round(time.time() - started, 2),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _same_keys(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Let a process without a batch take part in the sums with zeros."""
        gathered: list = [None] * self.args.world_size
        dist.all_gather_object(gathered, sorted(sums))
        zero = torch.zeros((), device=self.args.device)
        return {name: sums.get(name, zero) for name in sorted(set().union(*gathered))}


class ConsoleCallback(TrainerCallback):
    """Shows one line per logging step: update and the most important numbers."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_train_begin(self, args, state, control, **kwargs):
        place = f"from update {state.global_step} " if state.global_step else ""
        self.progress.say(f"training {place}to update {state.max_steps}")
        self.progress.show("training", state.global_step, state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        self.micro_batches = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1
        total = args.gradient_accumulation_steps
        done = state.global_step + self.micro_batches / total
        note = f"update {state.global_step + 1}, micro-batch {self.micro_batches + 1} of {total}"
        self.progress.show("training", done, state.max_steps, note)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.show("training", state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = [f"{name} {_short(logs[name])}" for name in SHOWN if name in (logs or {})]
        if numbers:
            left = self.progress.time_left("training", state.global_step, state.max_steps)
            left = f" ({left} left)" if left else ""
            self.progress.say(
                f"update {state.global_step}/{state.max_steps}{left}  {'  '.join(numbers)}"
            )


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
