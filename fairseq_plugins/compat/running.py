"""Running and stopping: options that fail obscurely, NaN losses, signals, finished jobs."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
from collections.abc import Callable

import fairseq_cli.train as fairseq_train
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, options
from fairseq.distributed import utils as distributed_utils
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.trainer import Trainer

from fairseq_plugins.replaced import replaces
from metro.utils.messages import UserError

logger = logging.getLogger(__name__)


class Stop:
    """A request to stop the run: of this process by a signal, or of any process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = False

    @property
    def requested_here(self) -> bool:
        return self.signal is not None

    def listen(self) -> Callable[[], None]:
        """Let SIGTERM and Ctrl-C ask to stop after the current update; returns how to undo that.

        A second Ctrl-C stops at once.
        """
        self.signal, self.agreed = None, False
        owner = os.getpid()

        def request(signum, frame):
            if os.getpid() != owner:  # a data loader's process that inherited this handler
                if signum == signal.SIGTERM:
                    os._exit(128 + signum)
                return  # a terminal sends Ctrl-C to all processes; the training still needs it
            if signum == signal.SIGINT and self.signal == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = signal.Signals(signum)
            again = "" if signum == signal.SIGTERM else " (Ctrl-C again: at once, without saving)"
            said = f"{self.signal.name}: saving after the current update, then stopping{again}\n"
            # Not logged: a logger may be writing just now, and cannot be entered twice.
            os.write(2, said.encode())

        try:
            before = {
                signum: signal.signal(signum, request) for signum in (signal.SIGTERM, signal.SIGINT)
            }
        except ValueError:  # not the main thread
            return lambda: None

        def unlisten() -> None:
            for signum, handler in before.items():
                signal.signal(signum, handler or signal.SIG_DFL)

        return unlisten


stop = Stop()


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


@replaces(Trainer, "__init__")
def refuse_fp16_on_cpu(original, self, cfg, *args, **kwargs):
    """Refuse fp16 without a GPU; fairseq fails with an assertion deep in torch.cuda."""
    on_cpu = cfg.common.cpu or not torch.cuda.is_available()
    if on_cpu and cfg.common.fp16 and not cfg.common.memory_efficient_fp16:
        raise UserError(
            "common.fp16 is true but the run is on CPU; set common.fp16=false (bf16 works on CPU "
            "too, but is slower there than fp32)"
        )
    original(self, cfg, *args, **kwargs)


@replaces(Trainer, "train_step")
def name_the_batch(original, self, samples, raise_oom=False):
    """Say which update and examples made a loss NaN; see `loss_guard`."""
    guard = getattr(self.task, "loss_guard", None)
    if guard is None:
        return original(self, samples, raise_oom)
    guard.clear()
    before = self.get_num_updates()
    try:
        result = original(self, samples, raise_oom)
    except FloatingPointError as error:
        raise guard.explain(error, before) from error
    guard.check(before)  # where the optimizer step was skipped (overflow in fp16)
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
    unlisten = stop.listen()
    try:
        return original(cfg, trainer, task, epoch_itr)
    finally:
        unlisten()


@replaces(fairseq_train, "validate_and_save")
def save_and_stop(original, cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
    """After a request to stop: save at once, without validation, and end the run."""
    done, limit = trainer.get_num_updates(), cfg.optimization.max_update
    alone = trainer.data_parallel_world_size == 1
    if not (stop.agreed or (alone and stop.requested_here)) or (limit and done >= limit):
        return original(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    if dist.is_available() and dist.is_initialized():
        # A node that is done first must not make the launcher end the one that writes.
        dist.barrier(distributed_utils.get_global_group())
    logger.warning("stopped after update %d; the same command resumes here", done)
    if stop.signal == signal.SIGINT:
        raise SystemExit(128 + signal.SIGINT)  # a shell script must stop too
    return [None], True
