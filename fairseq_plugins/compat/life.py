"""Signs of life: what is waited for, how large the model is, how long an update takes."""

from __future__ import annotations

import contextlib
import datetime
import logging
import resource
import sys
import time
from collections.abc import Iterator

import fairseq_cli.train as fairseq_train
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from fairseq_plugins.replaced import replaces
from metro.utils.progress import LIFE, Progress

logger = logging.getLogger(__name__)

SECONDS_OF_SILENCE = 55.0
"""While training, where log_interval says how often a line is wanted."""
BYTES_PER_PARAMETER = 16
"""Weights, gradients and two moments in float32; with 16 bits, two copies of the weights."""

progress = Progress(bars=False)


class Heard(logging.Handler):
    """Notices what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        LIFE.heard()


heard = Heard()


@contextlib.contextmanager
def living(what: str, silence: float | None = None) -> Iterator[None]:
    """Name what is being done, in the first process, whenever nothing is logged for a while."""
    if distributed_utils.get_global_rank() > 0:
        yield
        return
    before, LIFE.silence = LIFE.silence, silence or LIFE.silence
    logging.getLogger().addHandler(heard)
    try:
        with LIFE:
            LIFE.do(what)
            yield
    finally:
        logging.getLogger().removeHandler(heard)
        LIFE.silence = before


def names(owner, function: str, what: str) -> None:
    """Log what a function of fairseq does, and say it again while it lasts."""

    @replaces(owner, function)
    def named(original, *args, **kwargs):
        logger.info(what)
        with living(what):
            return original(*args, **kwargs)


names(tasks, "setup_task", "reading the vocabulary")
names(tasks.FairseqTask, "build_model", "building the model")
names(checkpoint_utils, "load_checkpoint", "opening the data, and the checkpoint to resume from")
names(fairseq_train, "validate", "validating")
names(checkpoint_utils, "save_checkpoint", "saving a checkpoint")


@replaces(Trainer, "__init__")
def say_the_size(original, self, cfg, task, model, *args, **kwargs):
    """Say how much memory the model takes before it takes it."""
    count = sum(parameter.numel() for parameter in model.parameters())
    device = "the GPU" if torch.cuda.is_available() and not cfg.common.cpu else "the CPU"
    logger.info(
        "%s parameters: training takes %.1f GB of memory on %s, and more for the activations of "
        "%s tokens",
        f"{count:,}",
        count * BYTES_PER_PARAMETER / 1e9,
        device,
        cfg.dataset.max_tokens or f"{cfg.dataset.batch_size} x {cfg.task.tokens_per_sample}",
    )
    original(self, cfg, task, model, *args, **kwargs)


@replaces(fairseq_train, "train")
def live(original, cfg, trainer, task, epoch_itr):
    """Say how far training is whenever nothing is logged for a minute."""
    with living("training: the first batch", SECONDS_OF_SILENCE):
        return original(cfg, trainer, task, epoch_itr)


def show(trainer, micro_batch: int, num_micro_batches: int) -> None:
    """Show the place within training; a line where one is due."""
    done, total = trainer.get_num_updates(), trainer.cfg.optimization.max_update or None
    note = f"update {done + 1:,}"
    if num_micro_batches > 1:
        note += f", micro-batch {micro_batch + 1} of {num_micro_batches}"
    progress.show("training", done + micro_batch / num_micro_batches, total, note)


@replaces(Trainer, "train_step")
def say_how_long(original, self, samples, raise_oom=False):
    """Say after the first update how long all of them take, and the memory."""
    began, before = time.monotonic(), self.get_num_updates()
    result = original(self, samples, raise_oom)
    common = self.cfg.common
    if sys.stderr.isatty() and not common.no_progress_bar and common.log_format in (None, "tqdm"):
        LIFE.heard()  # a bar that moves
    seconds, left = time.monotonic() - began, (self.cfg.optimization.max_update or 0) - before
    if not getattr(self, "said_how_long", False) and left > 0 and result is not None:
        self.said_how_long = True
        on_gpu = self.cuda and torch.cuda.is_available()
        memory = (
            torch.cuda.max_memory_allocated()
            if on_gpu
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        if distributed_utils.get_global_rank() == 0:
            logger.info(
                "the first update took %.1f s: %s in all for %s updates; %.1f GB of memory",
                seconds,
                datetime.timedelta(seconds=round(seconds * left)),
                f"{left:,}",
                memory / 1e9,
            )
    return result
