"""Base of every task: a vocabulary with sentinels, guards, a clean stop."""

import logging
from pathlib import Path

from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask

from fairseq_plugins.compat.running import stop
from metro.pretraining.loss_guard import LossGuard
from metro.utils.checksums import refuse_damage
from metro.utils.messages import UserError

logger = logging.getLogger(__name__)


def load_dictionary(path: Path) -> Dictionary:
    """Read a `dict.txt`.

    Raises:
        UserError: it is damaged.
    """
    refuse_damage(path.parent, [path.name])
    try:
        path.read_text(encoding="utf-8")
        return Dictionary.load(str(path))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a dictionary of fairseq ({error}): copy it again") from None


class SentinelTask(FairseqTask):
    """A task whose vocabulary is dict.txt followed by `tokens_per_sample` sentinels."""

    def __init__(self, cfg, dictionary: Dictionary):
        super().__init__(cfg)
        if cfg.tokens_per_sample < 3:
            raise UserError(
                f"tokens_per_sample is {cfg.tokens_per_sample}; an example needs room for <s>, "
                "</s> and a token: use at least 3"
            )
        self.max_width: int | None = None  # longest sequence that the model takes, once it is built
        self.dictionary = dictionary
        self.first_sentinel = len(dictionary)
        for i in range(cfg.tokens_per_sample):
            index = dictionary.add_symbol(f"<sen{i:03d}>")
            if index != self.first_sentinel + i:
                raise UserError(
                    f"dict.txt in {cfg.data} already holds <sen{i:03d}> (id {index}); sentinels "
                    "are added by the task: remove them from dict.txt"
                )
        self.loss_guard = LossGuard()

    def get_batch_iterator(self, *args, **kwargs):
        """As fairseq's, with new loader processes in every epoch.

        fairseq keeps them alive with the dataset of the first epoch inside, so with
        num_workers > 0 (its default is 1) the masks of epoch 1 would be used forever.
        """
        iterator = super().get_batch_iterator(*args, **kwargs)
        iterator.reuse_dataloader = iterator.persistent_workers = False
        return iterator

    def build_model(self, cfg, from_checkpoint: bool = False):
        model = super().build_model(cfg, from_checkpoint)
        if self.cfg.tokens_per_sample > model.max_positions():
            raise UserError(
                f"tokens_per_sample {self.cfg.tokens_per_sample} is larger than the model's "
                f"max_positions {model.max_positions()}; lower the first or raise the second"
            )
        self.max_width = model.max_positions()
        return model

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        loss, sample_size, logging_output = super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad
        )
        self.loss_guard.watch(loss, sample["id"])
        # Summed over ranks with the other numbers, so that all ranks stop after the same update.
        logging_output["stop_requests"] = int(stop.requested_here)
        return loss, sample_size, logging_output

    def optimizer_step(self, optimizer, model, update_num):
        # fairseq has just synchronised for the gradient norm: looking at the losses costs nothing.
        self.loss_guard.check(update_num)
        super().optimizer_step(optimizer, model, update_num)

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        if sum(output.get("stop_requests", 0) for output in logging_outputs) > 0:
            stop.agreed = True

    def max_positions(self) -> int | tuple[int, int]:
        return self.cfg.tokens_per_sample

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary
