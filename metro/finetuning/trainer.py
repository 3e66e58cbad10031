"""The Trainer with the data and losses of prompt finetuning; imported for training only."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metro.finetuning.batches import EncodedPrompts, EpochBatches, EpochLoader
from metro.finetuning.collation import EncodedPrompt, collate_prompts
from metro.finetuning.data import PromptData
from metro.finetuning.losses import BatchLoss, LossOptions, batch_loss
from metro.finetuning.validation import ValidationRows
from metro.training.sharding import is_sharded
from metro.training.trainer import DIVERGED, MetroTrainer, Stopped
from metro.utils.messages import UserError, shortened

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
    "eval_accuracy",
)


class FinetuningTrainer(MetroTrainer):
    """Trains on `PromptData` under one objective.

    Logged beside the loss: for flipped and direct+ul both terms (`likelihood`, `unlikelihood`), the
    target's mean probability with the right and with the wrong label (`right_prob`, `wrong_prob`
    and their logarithms) and the share of examples where the right one is greater
    (`ranked_right`); for direct and channel the share of examples with every target token most
    probable (`exact_match`); the share of padding, and the numbers of examples skipped because they
    have no wrong label (`skipped_examples`), and of cut texts (`cut_sources`, `cut_targets`).
    """

    shown = SHOWN

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
        ranked: ValidationRows | None = None,
        **kwargs,
    ):
        self.loss_options, self.batching, self.max_width = loss_options, batching, max_width
        self.ranked = ranked
        super().__init__(
            model,
            args,
            train_dataset=None if train_data is None else EncodedPrompts(train_data),
            eval_dataset=None if valid_data is None else EncodedPrompts(valid_data),
            data_collator=self.collate,
            **kwargs,
        )
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
        """Return the micro-batches of one update, and the number of items of all processes.

        Raises:
            Stopped: there is none, as an earlier run ended before it had written the model.
        """
        if self.state.global_step >= self.state.max_steps:
            raise Stopped
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        name = "num_target_tokens" if self.loss_options.mean == "tokens" else "num_examples"
        num_items = float(sum(batch[name] for batch in batches))
        return batches, self.count_items(num_items)

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

    # --- logging and evaluation ---

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with means over everything since the last line of training."""
        if "loss" in logs and self.sums:
            logs = {**logs, **self._means(self.sums)}
            counts = torch.tensor([float(self.num_skipped), *self.num_cut.sum(1).tolist()])
            totals = self.sum_over_processes(counts.to(self.args.device)).tolist()
            named = zip(("skipped_examples", *CUT), totals, strict=True)
            logs |= {name: int(number) for name, number in named if number}
            self.sums = {}
        super().log(logs, *args, **kwargs)

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
        counts = self.sum_over_processes(self.num_cut.to(self.args.device)).int().tolist()
        for remark, numbers in zip(remarks, counts, strict=True):
            cut = [f"{n} of {name}" for name, n in zip(names, numbers, strict=True) if n]
            if cut:
                self.progress.say(f"{remark}: {', '.join(cut)}")

    def _means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Compute means over all processes with one transfer."""
        names = sorted(sums)
        values = self.sum_over_processes(torch.stack([sums[name].float() for name in names]))
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
        for done in range(0, len(dataset), world_size * size):
            start = done + self.args.process_index * size
            self.progress.show("evaluating", start, len(dataset))
            if world_size == 1 and self.stop.requested_here:
                self.stopping.save_and_stop(self.args, self.state, self.control)
                return {}
            positions = longest_first[start : start + size].tolist()
            batch = self.collate([dataset[0, position] for position in positions])
            inputs = self._prepare_inputs(batch)
            skipped += inputs["num_skipped"]
            if "source_ids" not in inputs:
                if is_sharded(self.model) or self.is_deepspeed_enabled:
                    self._take_part()
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
        total, num_items, num_skipped = self.sum_over_processes(parts).tolist()
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
        if self.ranked is not None:
            metrics["accuracy"] = self._accuracy(self.ranked)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _accuracy(self, ranked: ValidationRows) -> float:
        """Measure the accuracy: the first process's, as others might disagree on when to stop."""
        precision: contextlib.AbstractContextManager = contextlib.nullcontext()
        if is_sharded(self.model):  # whose forward does both; ranking calls encoder and decoder
            self.model.unshard()
            precision = self.accelerator.autocast()
        with precision:
            own = ranked.accuracy(self.model) * (self.args.process_index == 0)
        accuracy = torch.tensor([own], dtype=torch.float64, device=self.args.device)
        return self.sum_over_processes(accuracy).item()

    def _take_part(self) -> None:
        """Help the other processes to gather a sharded model's weights, for a batch of theirs."""
        ids = torch.full((1, 2), 3, device=self.args.device)
        batch_loss(self.model, self.loss_options, ids, ids, ids)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Keep the best so far where an evaluation was stopped in the middle."""
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Warn of missing weights, but not of the embedding's other names."""
        if {*load_result.missing_keys} - {*getattr(self.model, "all_tied_weights_keys", {})}:
            super()._issue_warnings_after_load(load_result)

    def _same_keys(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Let a process without a batch take part in the sums with zeros."""
        gathered: list = [None] * self.args.world_size
        dist.all_gather_object(gathered, sorted(sums))
        zero = torch.zeros((), device=self.args.device)
        return {name: sums.get(name, zero) for name in sorted(set().union(*gathered))}
