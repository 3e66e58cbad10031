"""The Trainer of Hugging Face with METRO's data and losses.

Batches, their sharding over processes and the loss are ours; updates, mixed precision,
accumulation, checkpoints, resuming, logging and several processes are the Trainer's.
"""

from __future__ import annotations

import functools
import time

import torch
import torch.distributed as dist

from metro.finetuning.batches import EncodedPrompts, EpochBatches, EpochLoader
from metro.finetuning.collation import PromptBatch, collate_prompts
from metro.finetuning.data import PromptData
from metro.finetuning.losses import LossOptions, batch_loss
from metro.utils.messages import UserError

# logged mean -> (sum, what it is divided by)
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
    "padding_share": ("padding", "places"),
}


def trainer_class() -> type:
    """The Trainer with METRO's data and losses; made here, as importing theirs needs accelerate."""
    from transformers import Seq2SeqTrainer

    return type("FinetuningTrainer", (FinetuningLogic, Seq2SeqTrainer), {})


class FinetuningLogic:
    """What is mixed into the Trainer: trains on `PromptData` under one objective.

    Logged beside the loss: both terms of FLIPPED (`likelihood`, `unlikelihood`), the probability of
    the instruction under the right and a wrong label (`right_prob`, `wrong_prob` and their
    logarithms), how often the right label makes it likelier (`ranked_right`); for direct and
    channel how often every token of the target is the likeliest (`exact_match`); the share of
    padding, and how many examples were skipped because they have no wrong label.
    """

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
        **kwargs,
    ):
        self.loss_options, self.batching, self.max_width = loss_options, batching, max_width
        self.valid_data = valid_data
        super().__init__(
            model,
            args,
            train_dataset=None if train_data is None else EncodedPrompts(train_data),
            eval_dataset=None if valid_data is None else EncodedPrompts(valid_data),
            data_collator=self.collate,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the loss below is divided by all items of an update
        self.sums: dict[str, torch.Tensor] = {}
        self.num_skipped = 0

    def collate(self, examples: list) -> dict:
        """A batch for the loader; examples that cannot be used are None."""
        usable = [example for example in examples if example is not None]
        if not usable:
            return {"num_skipped": len(examples)}
        batch = collate_prompts(usable, self.loss_options.pad_token_id, None, self.max_width)
        return {**as_inputs(batch), "num_skipped": batch.num_skipped + len(examples) - len(usable)}

    # --- data ---

    def get_train_dataloader(self) -> EpochLoader:
        return self._loader(self.train_dataset, self.args.per_device_train_batch_size)

    def _loader(self, dataset: EncodedPrompts, batch_size: int) -> EpochLoader:
        batches = EpochBatches(
            dataset.data,
            batch_size,
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

    def get_batch_samples(self, epoch_iterator, num_batches: int, device=None):
        """The micro-batches of one update, and the items of all processes in them."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        name = "num_target_tokens" if self.loss_options.mean == "tokens" else "num_examples"
        num_items = torch.tensor(float(sum(batch.get(name, 0) for batch in batches)))
        return batches, self._sum_over_processes(num_items.to(self.args.device))

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
        # The gradients of the processes are averaged, and num_items_in_batch is of all of them.
        total = loss.total * self.args.world_size
        return (total, None) if return_outputs else total

    def _loss(self, model, inputs, num_items):
        loss = batch_loss(
            model,
            self.loss_options,
            inputs["input_ids"],
            inputs["target_ids"],
            inputs.get("wrong_ids"),
            num_items,
        )
        items = loss.sums[self.loss_options.mean]
        places = torch.full_like(items, inputs["num_places"])
        padding = torch.full_like(items, inputs["num_places"] - inputs["num_tokens"])
        return loss._replace(
            sums={**loss.sums, "items": items, "places": places, "padding": padding}
        )

    def floating_point_ops(self, inputs) -> int:
        """6 operations per parameter and token of a forward and backward pass."""
        return 6 * inputs.get("num_tokens", 0) * self._num_parameters

    @functools.cached_property
    def _num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    # --- logging and evaluation ---

    def log(self, logs: dict, *args, **kwargs) -> None:
        """As the Trainer's, with what was summed up since the last line of training."""
        if "loss" in logs and self.sums:
            logs = {**logs, **self._means(self.sums)}
            skipped = torch.tensor(float(self.num_skipped), device=self.args.device)
            skipped = int(self._sum_over_processes(skipped))
            if skipped:
                logs["skipped_examples"] = skipped
            self.sums = {}
        super().log(logs, *args, **kwargs)

    def _means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means over all processes; one transfer for all of them."""
        names = sorted(sums)
        values = self._sum_over_processes(torch.stack([sums[name].float() for name in names]))
        found = dict(zip(names, values.tolist(), strict=True))
        return {
            name: round(found[part] / found[whole], 6)
            for name, (part, whole) in MEANS.items()
            if part in found and found.get(whole)
        }

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **kwargs):
        """Loss and shares over the validation examples, each once."""
        data = (eval_dataset or self.eval_dataset).data
        started, sums, skipped = time.time(), {}, 0
        if self.is_world_process_zero():
            print(f"evaluating {len(data)} held-out examples", flush=True)
        self.model.eval()
        keys = [(0, position) for position in np_argsort(data.lengths(0))]
        size = self.args.per_device_eval_batch_size
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        mine = batches[self.args.process_index :: self.args.world_size]
        dataset = EncodedPrompts(data)
        for batch in mine:
            inputs = self._prepare_inputs(self.collate([dataset[key] for key in batch]))
            skipped += inputs["num_skipped"]
            if "input_ids" not in inputs:
                continue
            with self.compute_loss_context_manager():
                loss = self._loss(self.model, inputs, None)
            items = loss.sums["items"]
            for name, value in {**loss.sums, "loss": loss.total * items}.items():
                sums[name] = sums.get(name, 0) + value
        if self.args.world_size > 1:
            sums = self._same_keys(sums)
        if not sums:
            raise UserError(
                f"no validation example of {data.folder} can be used under the objective "
                f"{data.objective}; leave eval_steps out, or prepare tasks with options"
            )
        metrics = self._means(sums)
        parts = torch.stack([sums["loss"], sums["items"], torch.full_like(sums["loss"], skipped)])
        total, items, skipped = self._sum_over_processes(parts).tolist()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics[f"{metric_key_prefix}_loss"] = total / items
        metrics[f"{metric_key_prefix}_skipped_examples"] = int(skipped)
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - started, 2)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _same_keys(self, sums: dict) -> dict:
        """A process without a batch takes part in the sums with zeros."""
        gathered: list = [None] * self.args.world_size
        dist.all_gather_object(gathered, sorted(sums))
        zero = torch.zeros((), device=self.args.device)
        return {name: sums.get(name, zero) for name in sorted(set().union(*gathered))}


def as_inputs(batch: PromptBatch) -> dict:
    """What the loader hands over; tensors go to the device, numbers stay."""
    inputs = {
        "input_ids": batch.source_ids,
        "target_ids": batch.target_ids,
        "num_target_tokens": batch.num_target_tokens,
        "num_examples": len(batch.indices),
        "num_tokens": batch.num_tokens,
        "num_places": batch.num_places,
    }
    return inputs if batch.wrong_ids is None else {**inputs, "wrong_ids": batch.wrong_ids}


def np_argsort(lengths) -> list[int]:
    """Positions from the longest example to the shortest."""
    return (-lengths).argsort(kind="stable").tolist()
