"""Every repair that fairseq (fairseq-fixed 0.12.3.1) needs today, each with its reason.

`apply()` is called when the user dir is imported and may be called again. Functions of fairseq are
replaced by wrappers that call the original wherever that is possible.

Why more than 400 lines: one place for all repairs is worth more than short files. Sections: loading
checkpoints, writing them, several processes, running and stopping.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import logging
import os
import pickle
import re
import shutil
import signal
import textwrap
import typing
import warnings
import zipfile
from pathlib import Path

import fairseq_cli.train as fairseq_train
import omegaconf
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, options
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import ARCH_CONFIG_REGISTRY, distributed_fairseq_model
from fairseq.trainer import Trainer

from metro.models.reading import allowed_classes, explain_refusal
from metro.utils.files import flush
from metro.utils.messages import UserError

logger = logging.getLogger(__name__)


def replaces(owner, name: str, static: bool = False):
    """Decorator: put `function(original)` in the place of `owner.name`, once."""

    def decorate(make):
        original = getattr(owner, name)
        if getattr(original, "replaced_by_metro", False):
            return make
        wrapper = functools.wraps(original)(make(original))
        wrapper.replaced_by_metro = True
        setattr(owner, name, staticmethod(wrapper) if static else wrapper)
        return make

    return decorate


def apply() -> None:
    """Make all repairs. Does nothing the second time."""
    allow_checkpoint_classes()
    repair_loading()
    repair_writing()
    repair_processes()
    repair_running()


# --- loading checkpoints ------------------------------------------------------------------------


def allow_checkpoint_classes() -> None:
    """Let `torch.load(weights_only=True)`, the default since torch 2.6, read fairseq's own objects.

    A checkpoint's `cfg` is an omegaconf tree once it is in memory (and is sent to the other ranks
    so, large tensors as placeholders); those of the original hold an `argparse.Namespace`. Anything
    else in a file is still refused, and nothing is loaded with weights_only=False.
    """
    torch.serialization.add_safe_globals([*allowed_classes(), distributed_utils._TensorPlaceholder])


resuming_from: str | None = None  # the checkpoint_last.pt that a run is resuming from just now
DAMAGE = re.compile("PytorchStreamReader|unexpected EOF|wrong (byte )?size|corrupt file")


def is_damage(path: str, error: Exception) -> bool:
    """Whether a file failed to load because it is cut or blank.

    Not where memory ran out or a class was refused: another file would then only hide the reason.
    """
    with open(path, "rb") as file:
        if not any(file.read(512)):  # empty, or zeros as after a power cut
            return True
    if isinstance(error, OSError):
        return error.errno in (errno.EIO, errno.EINVAL)
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return DAMAGE.search(str(error)) is not None
    return isinstance(error, EOFError | zipfile.BadZipFile)


def _load(original, path, *args, **kwargs) -> dict:
    """As `original`, saying which file was refused."""
    try:
        return _true_depth(original(path, *args, **kwargs))
    except pickle.UnpicklingError as error:
        raise UserError(explain_refusal(Path(path), error)) from error


def repair_loading() -> None:
    @replaces(checkpoint_utils, "load_checkpoint_to_cpu")
    def with_fallback(original):
        """A damaged checkpoint_last.pt gives way to the newest checkpoint beside it that loads.

        fairseq ends with EOFError although complete checkpoints lie in the folder. Only where a run
        resumes by itself: a file that the user named is that file or an error.
        """

        def load_checkpoint_to_cpu(path, *args, **kwargs):
            try:
                return _load(original, path, *args, **kwargs)
            except Exception as error:
                name = os.path.basename(path)
                if path != resuming_from or not os.path.isfile(path) or not is_damage(path, error):
                    raise
                for other in newest_checkpoints(os.path.dirname(path), besides=name):
                    try:
                        state = _load(original, other, *args, **kwargs)
                    except Exception as other_error:
                        if is_damage(other, other_error):
                            continue
                        raise
                    logger.error(
                        "%s IS DAMAGED (%s: %s). CONTINUING FROM %s INSTEAD; remove the damaged "
                        "file if this is not what you want.",
                        path,
                        type(error).__name__,
                        str(error).splitlines()[0] if str(error) else "",
                        other,
                    )
                    return state
                raise UserError(
                    f"{path} is damaged ({type(error).__name__}: {error}) and no other checkpoint "
                    "in its folder can be loaded; remove it to start again"
                ) from error

        return load_checkpoint_to_cpu

    @replaces(checkpoint_utils, "load_checkpoint")
    def restore_missing_last(original):
        """Without checkpoint_last.pt fairseq starts again, even beside complete checkpoints.

        That happens when a run dies between writing its first checkpoint and copying it to
        checkpoint_last.pt.
        """

        def load_checkpoint(cfg, trainer, **kwargs):
            global resuming_from
            name = f"checkpoint_last{trainer.checkpoint_suffix}.pt"
            last = os.path.join(cfg.save_dir, name)
            resumes = cfg.restore_file == "checkpoint_last.pt" and not cfg.no_last_checkpoints
            if resumes:
                if trainer.data_parallel_rank == 0 and not os.path.exists(last):
                    for newest in newest_checkpoints(cfg.save_dir, besides=name)[:1]:
                        logger.error("%s IS MISSING. CONTINUING FROM %s.", last, newest)
                        link_or_copy(newest, last)
                if dist.is_available() and dist.is_initialized():
                    dist.barrier(distributed_utils.get_global_group())
            resuming_from = last if resumes else None
            try:
                return original(cfg, trainer, **kwargs)
            finally:
                resuming_from = None

        return load_checkpoint

    @replaces(Trainer, "load_checkpoint")
    def show_the_reason(original):
        """fairseq says "please ensure that the architectures match" instead of the reason."""

        def load_checkpoint(self, filename, *args, **kwargs):
            try:
                return original(self, filename, *args, **kwargs)
            except Exception as error:
                reason = error.__context__
                if isinstance(reason, ValueError):
                    raise reason from None
                if isinstance(reason, RuntimeError) and LOADING.match(str(reason)):
                    raise UserError(explain_mismatch(filename, str(reason))) from None
                raise

        return load_checkpoint

    @replaces(distributed_utils, "_broadcast_object_slow")
    def without_arbitrary_pickle(original):
        """Receive objects with weights_only=True said aloud, whatever the default is."""

        def _broadcast_object_slow(obj, src_rank, group, dist_device):
            is_source = distributed_utils.get_rank(group) == src_rank
            buffer = io.BytesIO()
            if is_source:
                torch.save(obj, buffer)
            length = torch.tensor([buffer.getbuffer().nbytes], device=dist_device)
            distributed_utils.broadcast(length, src=src_rank, group=group)
            if is_source:
                data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(dist_device)
            else:
                data = torch.empty(int(length), dtype=torch.uint8, device=dist_device)
            distributed_utils.broadcast(data, src=src_rank, group=group)
            if is_source:
                return obj
            received = io.BytesIO(data.cpu().numpy().tobytes())
            return torch.load(received, map_location="cpu", weights_only=True)

        return _broadcast_object_slow


LOADING = re.compile(r"Error\(s\) in loading state_dict")


def explain_mismatch(path: str, error: str) -> str:
    """What torch says about weights that do not fit the model, as one line."""
    _, first, *others = error.splitlines()
    more = f" (and {len(others)} more like it)" if others else ""
    return (
        f"{path} does not fit the model: {textwrap.shorten(first, 300).rstrip('. ')}{more}. Give "
        "the architecture and the sizes that it was trained with (encoder_embed_dim, "
        "encoder_layers, encoder_attention_heads, max_positions, ...)"
    )


def newest_checkpoints(folder: str, besides: str) -> list[str]:
    """Complete checkpoints in a folder, newest first; crash.pt holds an update that failed."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    paths = [
        os.path.join(folder, name)
        for name in names
        if re.fullmatch(r"checkpoint.*\.pt", name) and name != besides
    ]
    return sorted(paths, key=os.path.getmtime, reverse=True)


def _true_depth(state: dict) -> dict:
    """METRO checkpoints of the original state the generator's depth as `encoder_layers`."""
    model_cfg = (state.get("cfg") or {}).get("model")
    name = getattr(model_cfg, "_name", None) or getattr(model_cfg, "arch", None) or ""
    names = [re.match(r"encoder\.layers\.(\d+)\.", key) for key in state.get("model", {})]
    depths = {int(match[1]) + 1 for match in names if match}
    if str(name).startswith("t5_metro") and depths:
        if isinstance(model_cfg, omegaconf.DictConfig):
            omegaconf.OmegaConf.set_struct(model_cfg, False)
        model_cfg.encoder_layers = max(depths)
    return state


# --- writing checkpoints ------------------------------------------------------------------------


def link_or_copy(source: str, target: str) -> None:
    """Make `target` the same file as `source`: at every moment it is the old one or the new one.

    A hard link costs no second write; checkpoints are never changed in place. Where the file system
    has no links, a copy is completed under another name first.
    """
    temporary = f"{target}.tmp"
    if os.path.lexists(temporary):
        os.remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        flush(temporary)
    os.replace(temporary, target)
    flush(os.path.dirname(os.path.abspath(target)))


def repair_writing() -> None:
    @replaces(PathManager, "copy", static=True)
    def atomically(original):
        """fairseq copies over checkpoint_last.pt: killed there, it leaves a truncated file."""

        def copy(src_path, dst_path, overwrite=False):
            if PathManager.path_requires_pathmanager(dst_path):
                return original(src_path, dst_path, overwrite)
            link_or_copy(src_path, dst_path)
            return True

        return copy

    @replaces(PathManager, "rename", static=True)
    def durably(original):
        """The first file of a save is renamed without fsync: a power cut can leave it empty."""

        def rename(src, dst):
            flush(src)
            original(src, dst)
            flush(os.path.dirname(os.path.abspath(dst)))

        return rename

    @replaces(checkpoint_utils, "verify_checkpoint_directory")
    def without_race(original):
        """Several processes create and remove the same file "dummy"; the slower one crashed."""

        def verify_checkpoint_directory(save_dir):
            try:
                original(save_dir)
            except FileNotFoundError:
                logger.info("another process removed the test file in %s first", save_dir)

        return verify_checkpoint_directory


# --- several processes --------------------------------------------------------------------------


def torchrun_world() -> int | None:
    """Number of processes that torchrun (or torch.distributed.launch) started; None without it."""
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else None


def refuse_separate_runs(training) -> None:
    """Raise where a launcher started several processes that fairseq would train separately.

    fairseq joins them in one case: under Slurm, with a port and more than one process configured.
    """
    world, has_port = training.distributed_world_size, training.distributed_port > 0
    remedy = (
        "Start torchrun once per node (scripts/pretrain_slurm.sh, scripts/pretrain_torchrun.sh)"
    )
    slurm_remedy = (
        ", or give distributed_training.distributed_world_size (all processes) and distributed_port"
    )
    for launcher, variable in (
        ("mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("Slurm", "SLURM_STEP_NUM_TASKS"),
    ):
        tasks = int(os.environ.get(variable) or 1)
        is_slurm = launcher == "Slurm"
        if tasks > 1 and not (is_slurm and has_port and world > 1):
            raise UserError(
                f"{launcher} started {tasks} processes ({variable}) but distributed_world_size is "
                f"{world} and distributed_port {training.distributed_port}: each would train its "
                f"own model into the same folder. {remedy}{slurm_remedy if is_slurm else ''}"
            )


def join_torchrun(training, world: int) -> None:
    """Fill in fairseq's distributed options from torchrun's environment."""
    automatic = {1, torch.cuda.device_count(), world}
    if training.distributed_world_size not in automatic:
        raise UserError(
            f"distributed_world_size is {training.distributed_world_size} but torchrun started "
            f"{world} processes; leave distributed_world_size out: torchrun's number is used"
        )
    with omegaconf.open_dict(training):
        training.distributed_world_size = world
        training.distributed_rank = int(os.environ["RANK"])
        training.device_id = int(os.environ.get("LOCAL_RANK", 0))
        training.distributed_no_spawn = True
        if world > 1:
            training.distributed_init_method = "env://"
        training.distributed_num_procs = 1


def repair_processes() -> None:
    @replaces(distributed_utils, "infer_init_method")
    def from_torchrun(original):
        """Under torchrun, fairseq trains separate copies when it sees at most one GPU per node.

        Its default world size is the number of local GPUs (at least 1), and it looks at torchrun's
        environment only when that is not 1; without GPUs it then divides by zero.
        """

        def infer_init_method(cfg, force_distributed=False):
            if cfg.distributed_init_method is not None or cfg.tpu or cfg.pipeline_model_parallel:
                return original(cfg, force_distributed)
            world = torchrun_world()
            if world is not None:
                return join_torchrun(cfg, world)
            refuse_separate_runs(cfg)
            # With a port, Slurm's own tasks are the processes and nothing is spawned.
            in_slurm = "SLURM_STEP_NUM_TASKS" in os.environ and cfg.distributed_port > 0
            if cfg.distributed_world_size > 1 and not torch.cuda.is_available() and not in_slurm:
                _refuse_spawn(cfg.distributed_world_size)
            world, gpus = cfg.distributed_world_size, torch.cuda.device_count()
            try:
                return original(cfg, force_distributed)
            except AssertionError as error:
                slurm = {name: os.environ.get(f"SLURM_{name}") for name in ("NNODES", "NTASKS")}
                raise UserError(
                    f"distributed_world_size {world} does not fit what fairseq finds ({error}): "
                    f"{gpus} GPUs here, {slurm['NNODES']} Slurm nodes, {slurm['NTASKS']} Slurm "
                    "tasks. Start torchrun once per node (scripts/pretrain_slurm.sh) and leave "
                    "distributed_world_size out, or set it to the number of all processes, with "
                    "distributed_port"
                ) from error

        return infer_init_method

    @replaces(distributed_utils, "call_main")
    def spawn_something(original):
        """Without GPUs fairseq spawns zero processes, trains nothing and exits with 0."""

        def call_main(cfg, main, **kwargs):
            training = cfg.distributed_training
            if training.distributed_init_method is None:
                distributed_utils.infer_init_method(training)
            spawns = training.distributed_init_method and not training.distributed_no_spawn
            if spawns and not torch.cuda.is_available():
                _refuse_spawn(training.distributed_world_size)
            return original(cfg, main, **kwargs)

        return call_main

    @replaces(distributed_utils, "distributed_init")
    def with_fresh_store(original):
        """Choose gloo without GPUs, and give every restart of torchrun its own names in the store.

        fairseq's default is NCCL. Workers restarted by torchrun find the addresses of the dead ones
        in the store that torchrun's agent keeps, and hang.
        """

        def distributed_init(cfg):
            training, common = cfg.distributed_training, cfg.common
            if common.cpu or not torch.cuda.is_available():
                training.distributed_backend = "gloo"
            if training.distributed_init_method == "env://" and not dist.is_initialized():
                rank, world = training.distributed_rank, training.distributed_world_size
                store, _, _ = next(dist.rendezvous("env://", rank, world))
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                dist.init_process_group(
                    training.distributed_backend,
                    store=dist.PrefixStore(f"attempt_{attempt}", store),
                    rank=rank,
                    world_size=world,
                )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Distributed is already initialized")
                return original(cfg)

        return distributed_init

    @replaces(fairseq_train, "add_defaults")
    def join_late(original):
        """fairseq-hydra-train imports the user dir in main(), after it has decided not to join.

        This is the first thing that main() calls after that import, so the process joins here; with
        this, plain `torchrun ... fairseq-hydra-train` trains one model.
        """

        def add_defaults(cfg):
            original(cfg)
            if dist.is_available() and dist.is_initialized():
                return
            training = cfg.distributed_training
            distributed_utils.infer_init_method(training)
            if training.distributed_init_method is not None and training.distributed_no_spawn:
                if torch.cuda.is_available() and not cfg.common.cpu:
                    torch.cuda.set_device(training.device_id)
                distributed_utils.distributed_init(cfg)

        return add_defaults

    @replaces(distributed_fairseq_model, "DistributedDataParallel")
    def on_cpu(original):
        """fairseq always passes device_ids, which PyTorch refuses for a model on the CPU."""

        def distributed_data_parallel(module, device_ids=None, output_device=None, **kwargs):
            if next(module.parameters()).device.type == "cpu":
                device_ids = output_device = None
            return original(module, device_ids=device_ids, output_device=output_device, **kwargs)

        return distributed_data_parallel


def _refuse_spawn(world: int) -> None:
    raise UserError(
        f"distributed_world_size is {world} but this machine shows no GPU, and fairseq starts one "
        f"process per GPU. On CPUs: torchrun --nproc_per_node {world} $(which fairseq-train) ..."
    )


# --- running and stopping -----------------------------------------------------------------------


class Stop:
    """Whether the run was asked to stop: this process by a signal, or any of them."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = False

    @property
    def requested_here(self) -> bool:
        return self.signal is not None

    def listen(self) -> typing.Callable[[], None]:
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
            os.write(
                2, said.encode()
            )  # a logger may be writing just now, and cannot be entered twice

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


def repair_running() -> None:
    @replaces(options, "parse_args_and_arch")
    def not_tpu_and_not_without_model(original):
        """`--bf16` on the command line switches to TPU mode, which fails without torch_xla.

        And without `--arch` fairseq raises a RuntimeError that says nothing.
        """

        def parse_args_and_arch(parser, *args, **kwargs):
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

        return parse_args_and_arch

    @replaces(Trainer, "__init__")
    def refuse_fp16_on_cpu(original):
        """fp16 needs a GPU; fairseq fails with an assertion deep in torch.cuda."""

        def __init__(self, cfg, *args, **kwargs):
            on_cpu = cfg.common.cpu or not torch.cuda.is_available()
            if on_cpu and cfg.common.fp16 and not cfg.common.memory_efficient_fp16:
                raise UserError(
                    "common.fp16 is true but the run is on CPU; set common.fp16=false "
                    "(bf16 works on CPU too, but is slower there than fp32)"
                )
            original(self, cfg, *args, **kwargs)

        return __init__

    @replaces(Trainer, "train_step")
    def name_the_batch(original):
        """Say which update and examples made a loss NaN; see `loss_guard`."""

        def train_step(self, samples, raise_oom=False):
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

        return train_step

    @replaces(fairseq_train, "train")
    def listen_and_know_the_end(original):
        """A finished job started again trains one more update; SIGTERM and Ctrl-C save nothing."""

        def train(cfg, trainer, task, epoch_itr):
            done, limit = trainer.get_num_updates(), cfg.optimization.max_update
            if limit and done >= limit:
                logger.info("nothing to do: %d of %d updates are already done", done, limit)
                return [None], True
            unlisten = stop.listen()
            try:
                return original(cfg, trainer, task, epoch_itr)
            finally:
                unlisten()

        return train

    @replaces(fairseq_train, "validate_and_save")
    def save_and_stop(original):
        """After a request to stop: save at once, without validation, and end the run."""

        def validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
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
                raise SystemExit(128 + signal.SIGINT)  # a shell script must not go on
            return [None], True

        return validate_and_save
