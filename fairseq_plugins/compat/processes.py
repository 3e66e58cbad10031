"""Several processes: joining torchrun, refusing launches that would train separate models."""

from __future__ import annotations

import os
import warnings
from typing import NoReturn

import fairseq_cli.train as fairseq_train
import omegaconf
import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model

from fairseq_plugins.replaced import replaces
from metro.utils.messages import UserError

TORCHRUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
START_TORCHRUN = "Start torchrun once per node (scripts/pretrain_slurm.sh"


@replaces(distributed_utils, "infer_init_method")
def infer_init_method_from_torchrun(original, cfg, force_distributed=False):
    """Join torchrun's processes.

    Under torchrun, fairseq trains separate copies when it sees at most one GPU per node: its
    default world size is the number of local GPUs (at least 1), and it looks at torchrun's
    environment only when that is not 1; without GPUs it then divides by zero.
    """
    if cfg.distributed_init_method is not None or cfg.tpu or cfg.pipeline_model_parallel:
        return original(cfg, force_distributed)
    if all(name in os.environ for name in TORCHRUN_VARIABLES):
        return join_torchrun(cfg, int(os.environ["WORLD_SIZE"]))
    refuse_separate_runs(cfg)
    # With a port, Slurm's own tasks are the processes and nothing is spawned.
    in_slurm = "SLURM_STEP_NUM_TASKS" in os.environ and cfg.distributed_port > 0
    world, gpus = cfg.distributed_world_size, torch.cuda.device_count()
    if world > 1 and not torch.cuda.is_available() and not in_slurm:
        refuse_spawn(world)
    try:
        return original(cfg, force_distributed)
    except AssertionError as error:
        nodes, tasks = (os.environ.get(f"SLURM_{name}") for name in ("NNODES", "NTASKS"))
        raise UserError(
            f"distributed_world_size {world} does not fit what fairseq finds ({error}): {gpus} "
            f"GPUs here, {nodes} Slurm nodes, {tasks} Slurm tasks. {START_TORCHRUN}) and leave "
            "distributed_world_size out, or set it to the number of all processes, with "
            "distributed_port"
        ) from error


@replaces(distributed_utils, "call_main")
def refuse_to_spawn_nothing(original, cfg, main, **kwargs):
    """Refuse where fairseq, without GPUs, spawns no process, trains nothing and exits with 0."""
    training = cfg.distributed_training
    if training.distributed_init_method is None:
        distributed_utils.infer_init_method(training)
    spawns = training.distributed_init_method and not training.distributed_no_spawn
    if spawns and not torch.cuda.is_available():
        refuse_spawn(training.distributed_world_size)
    return original(cfg, main, **kwargs)


@replaces(distributed_utils, "distributed_init")
def initialise_with_fresh_store(original, cfg):
    """Choose gloo without GPUs, and give every restart of torchrun its own names in the store.

    fairseq's default is NCCL. Workers restarted by torchrun find the addresses of the dead ones in
    the store that torchrun's agent keeps, and hang.
    """
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


@replaces(fairseq_train, "add_defaults")
def join_late(original, cfg):
    """Join after the user dir has been imported.

    fairseq-hydra-train imports it in main(), after it has decided not to join. This is the first
    thing that main() calls after that import, so the process joins here; with this, plain
    `torchrun ... fairseq-hydra-train` trains one model.
    """
    original(cfg)
    if dist.is_available() and dist.is_initialized():
        return
    training = cfg.distributed_training
    distributed_utils.infer_init_method(training)
    if training.distributed_init_method is not None and training.distributed_no_spawn:
        if torch.cuda.is_available() and not cfg.common.cpu:
            torch.cuda.set_device(training.device_id)
        distributed_utils.distributed_init(cfg)


@replaces(distributed_fairseq_model, "DistributedDataParallel")
def wrap_models_on_the_cpu(original, module, device_ids=None, output_device=None, **kwargs):
    """Drop the device_ids that fairseq always passes, which PyTorch refuses for CPU models."""
    if next(module.parameters()).device.type == "cpu":
        device_ids = output_device = None
    return original(module, device_ids=device_ids, output_device=output_device, **kwargs)


def refuse_separate_runs(training) -> None:
    """Raise where a launcher started several processes that fairseq would train separately.

    fairseq joins them in one case: under Slurm, with a port and more than one process configured.
    """
    world, port = training.distributed_world_size, training.distributed_port
    joins_slurm = port > 0 and world > 1
    slurm_remedy = (
        ", or give distributed_training.distributed_world_size (all processes) and distributed_port"
    )
    for launcher, variable, joins, remedy in (
        ("mpirun", "OMPI_COMM_WORLD_SIZE", False, ""),
        ("Slurm", "SLURM_STEP_NUM_TASKS", joins_slurm, slurm_remedy),
    ):
        tasks = int(os.environ.get(variable) or 1)
        if tasks > 1 and not joins:
            raise UserError(
                f"{launcher} started {tasks} processes ({variable}) but distributed_world_size is "
                f"{world} and distributed_port {port}: each would train its own model into the "
                f"same folder. {START_TORCHRUN}, scripts/pretrain_torchrun.sh){remedy}"
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


def refuse_spawn(world: int) -> NoReturn:
    """Say how to train in several processes on CPUs."""
    raise UserError(
        f"distributed_world_size is {world} but this machine shows no GPU, and fairseq starts one "
        f"process per GPU. On CPUs: torchrun --nproc_per_node {world} $(which fairseq-train) ..."
    )
