"""Running and stopping: options that fail obscurely, NaN losses, signals, finished jobs."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import re
import signal
import threading
import time
from types import SimpleNamespace

import fairseq_cli.train as fairseq_train
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, options
from fairseq.data.iterators import BackgroundConsumer
from fairseq.distributed import utils as distributed_utils
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.trainer import Trainer

from fairseq_plugins.compat.life import show
from fairseq_plugins.replaced import replaces
from metro.training.memory import Heap
from metro.utils.messages import UserError
from metro.utils.stopping import Stop

logger = logging.getLogger(__name__)


stop = Stop()
heap: Heap | None = None
"""Of a run on the CPU."""
running: Trainer | None = None
unfinished = 0
"""Micro-batches of the update within which the run stops: it is done again when the run resumes."""
SECONDS_FOR_THE_LAST_BATCH = 60.0


@atexit.register
def end_reading_ahead() -> None:
    """End fairseq's threads that prepare batches (`dataset.data_buffer_size`) before Python does.

    While it ends, Python ends daemon threads where they ask for the GIL; inside PyTorch's C++ code
    that aborts the process: a run that has done all its updates would end with status 134 and
    "terminate called without an active exception".
    """
    readers = [one for one in threading.enumerate() if isinstance(one, BackgroundConsumer)]
    for reader in readers:
        reader._max_len = 0  # it ends after the batch that it prepares
    patience = time.monotonic() + SECONDS_FOR_THE_LAST_BATCH
    while any(reader.is_alive() for reader in readers) and time.monotonic() < patience:
        for reader in readers:  # it may wait for a place in its queue
            with reader._queue.mutex:
                reader._queue.queue.clear()
                reader._queue.not_full.notify()
            reader.join(0.05)


class Stopped(Exception):
    """The run stops between two micro-batches or validation batches."""


class MicroBatches(list):
    """The micro-batches of an update; between two of them the run may stop."""

    def __init__(self, samples: list, trainer: Trainer):
        super().__init__(samples)
        self.trainer = trainer

    def __iter__(self):
        for number, sample in enumerate(super().__iter__()):
            is_last = number == len(self) - 1
            if number and (is_last or stop.requested_here) and any_process_stops():
                raise Stopped
            show(self.trainer, number, len(self))
            yield sample


def any_process_stops() -> bool:
    """Ask all processes; each asks once in an update, before the gradients are exchanged."""
    if not (dist.is_available() and dist.is_initialized()):
        return stop.requested_here
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    requests = torch.tensor(int(stop.requested_here), device=device)
    dist.all_reduce(requests, group=distributed_utils.get_data_parallel_group())
    return bool(requests)


@replaces(options, "parse_args_and_arch")
def parse_without_tpu_and_with_arch(original, parser, *args, **kwargs):
    """Keep `--bf16` from switching to TPU mode, which fails without torch_xla.

    And name the architectures where `--arch` is missing: fairseq's RuntimeError is empty.
    """
    try:
        result = original(parser, *args, **kwargs)
    except RuntimeError as error:
        if error.args:
            raise
        ours = [name for name in ARCH_CONFIG_REGISTRY if re.search("t5.*_rpe$", name)]
        parser.exit(2, f"error: --arch is missing; give a model: {', '.join(ours)}, ...\n")
    parsed = result[0] if isinstance(result, tuple) else result
    if getattr(parsed, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
        parsed.tpu = False
    return result


@replaces(fairseq_train, "add_defaults")
def refuse_fp16_on_cpu(original, cfg):
    """Refuse fp16 without a GPU before the model is built.

    fairseq fails with an assertion deep in torch.cuda.
    """
    original(cfg)
    on_cpu = cfg.common.cpu or not torch.cuda.is_available()
    if on_cpu and cfg.common.fp16 and not cfg.common.memory_efficient_fp16:
        raise UserError(
            "common.fp16 is true but the run is on CPU; set common.fp16=false (common.bf16=true "
            "works on CPUs too)"
        )


@replaces(Trainer, "train_step")
def name_the_batch(original, self, samples, raise_oom=False):
    """Say which update and examples made a loss NaN (see `loss_guard`); stop within an update."""
    guard = getattr(self.task, "loss_guard", None)
    if guard is None:
        return original(self, samples, raise_oom)
    if not self.is_fsdp:  # whose processes exchange weights in every micro-batch
        samples = MicroBatches(samples, self)
    guard.clear()
    before = self.get_num_updates()
    try:
        result = original(self, samples, raise_oom)
    except FloatingPointError as error:
        raise guard.explain(error, before) from error
    except Stopped:
        global unfinished
        unfinished, stop.agreed = len(samples), True
        return None
    guard.check(before)  # where the optimizer step was skipped (overflow in fp16)
    if heap:
        heap.tidy()
    return result


@replaces(fairseq_train, "train")
def listen_and_know_the_end(original, cfg, trainer, task, epoch_itr):
    """Do nothing for a finished job, and listen to signals.

    fairseq trains one more update then; on SIGTERM and Ctrl-C it saves nothing.
    """
    done, limit = trainer.get_num_updates(), cfg.optimization.max_update
    if limit and done >= limit:
        logger.info("nothing to do: %d of %d updates are already done", done, limit)
        return [None], True
    global unfinished, running, heap
    unfinished = 0
    if trainer is not running:  # not another epoch: a request in the validation of one counts still
        running = trainer
        heap = Heap() if trainer.device.type == "cpu" else None
        stop.clear()
    with stop.listen("saving after the current batch, then stopping"):
        return original(cfg, trainer, task, epoch_itr)


@replaces(Trainer, "valid_step")
def stop_validation(original, self, sample, raise_oom=False):
    """Let a process that runs alone stop within a long validation."""
    if stop.requested_here and self.data_parallel_world_size == 1:
        raise Stopped
    return original(self, sample, raise_oom)


@replaces(fairseq_train, "validate_and_save")
def save_and_stop(original, cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
    """After a request to stop: save at once, without validation, and end the run."""
    done, limit = trainer.get_num_updates(), cfg.optimization.max_update
    alone = trainer.data_parallel_world_size == 1
    if not (stop.agreed or (alone and stop.requested_here)) or (limit and done >= limit):
        try:
            return original(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        except Stopped:
            pass
    if done:
        place = before_the_update(epoch_itr) if unfinished else epoch_itr
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, place, None)
    if dist.is_available() and dist.is_initialized():
        # A node that is done first must not make the launcher end the one that writes.
        dist.barrier(distributed_utils.get_global_group())
    logger.warning("stopped after update %d; the same command resumes here", done)
    if stop.signal == signal.SIGINT:
        raise SystemExit(stop.status)  # a shell script must stop too
    return [None], True


def before_the_update(epoch_itr) -> SimpleNamespace:
    """Place in the data before the update that is unfinished, as `save_checkpoint` asks for it."""
    state = {
        "version": 2,
        "epoch": epoch_itr.epoch,
        "iterations_in_epoch": epoch_itr.n - unfinished,
        "shuffle": epoch_itr.shuffle,
    }
    return SimpleNamespace(
        epoch=epoch_itr.epoch, end_of_epoch=lambda: False, state_dict=lambda: state
    )
