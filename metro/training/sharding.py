"""Models sharded over processes by torch's FSDP2, and their checkpoints.

Every process keeps a part of each weight, gradient and optimizer state, in float32. A block of
layers is gathered while it is computed, in the precision of the training, and its gradients are
averaged in float32 after each micro-batch. The first process alone makes the model; the others get
it on ``meta``, and its weights block by block, of which they keep their parts at once.

Checkpoints are those of ``torch.distributed.checkpoint``: each process writes its own parts, and
any number of processes reads them. Weights that are not trained are not in them.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from metro.models.placement import processes_here
from metro.processes import Processes
from metro.sharding import ShardingSettings
from metro.training.output_folder import TRAINER_STATE
from metro.training.shard_files import METADATA, load_states
from metro.utils.checksums import facts, write_record
from metro.utils.messages import UserError

# Every view may be changed in place, which these models do not; one process is one on purpose.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
warnings.filterwarnings("ignore", "torch.distributed is disabled")
Model = TypeVar("Model", bound=nn.Module)
Made = TypeVar("Made")


class _WithoutWeights(pickle.Pickler):
    """Pickles tensors as such on ``meta``; those that modules share stay one."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        empty = value.detach().to("meta")
        if isinstance(value, nn.Parameter):
            empty = nn.Parameter(empty, value.requires_grad)
        return empty.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def made_once(make: Callable[[], Made], settings: ShardingSettings, args) -> Made:
    """Make a model that is to be sharded in the first process; any other in all of them.

    Args:
        make: returns the model, and what else all need.
        settings: of the run.
        args: of the Trainer: its device and processes.

    Returns:
        What ``make`` returned; in the other processes with all tensors on ``meta``.

    Raises:
        UserError: ``make`` raised one; every process does then.
    """
    if not settings.fsdp or args.world_size == 1:
        return make()
    processes = Processes(args.process_index, args.world_size, args.device)
    made = processes.on_first(make)

    def described() -> bytes:
        _WithoutWeights(file := io.BytesIO()).dump(made)
        return file.getvalue()

    sent = processes.from_first(described)
    return pickle.loads(sent) if made is None else made


def _receive(part: nn.Module, device: torch.device) -> None:
    """Take the weights and buffers of a module that are not sharded yet from the first process."""

    def receive(tensor: torch.Tensor) -> torch.Tensor:
        content = tensor.detach()
        if not tensor.is_meta:
            dist.broadcast(content.to(device), 0)
            return tensor
        dist.broadcast(content := torch.empty_like(content, device=device), 0)
        is_weight = isinstance(tensor, nn.Parameter)
        return nn.Parameter(content, tensor.requires_grad) if is_weight else content

    received: dict[torch.Tensor, torch.Tensor] = {}
    for module in part.modules():
        tables: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for own in tables:
            for name, tensor in own.items():
                if tensor is not None and not isinstance(tensor, DTensor):
                    if tensor not in received:  # else modules share it
                        received[tensor] = receive(tensor)
                    own[name] = received[tensor]


def shard(model: Model, settings: ShardingSettings, args) -> Model:
    """Shard a model in place, as the settings say; one process alone keeps all of it.

    Args:
        model: of `made_once`.
        settings: of the run.
        args: of the Trainer: its device and precision.

    Raises:
        UserError: the model does not say what its blocks are, or there are no processes.
    """
    if not settings.fsdp:
        return model
    if not dist.is_initialized():
        if settings.fsdp_offload:
            raise UserError(
                "fsdp_offload needs torchrun, also for one process: torchrun --nproc_per_node 1 "
                "$(which metro) ..."
            )
        return model
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    options: dict[str, Any] = {
        "mesh": _mesh(settings.fsdp, args.device.type),
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": offload if settings.fsdp_offload else OffloadPolicy(),
    }
    parts: list[nn.Module] = [*blocks(model), model]
    for part in parts:
        _receive(part, args.device)
        fully_shard(part, **options)
    return model


def _mesh(how: str, device: str) -> DeviceMesh:
    """Lay the processes out; ``hybrid`` has one row per node.

    Raises:
        UserError: the nodes are not known, or differ.
    """
    count = dist.get_world_size()
    if how == "full":
        return init_device_mesh(device, (count,))
    of_node = processes_here()
    if not of_node or count % of_node:
        raise UserError(
            f"fsdp hybrid shards among the processes of a node, and LOCAL_WORLD_SIZE is {of_node} "
            f"of {count}: start the same number on each node, with torchrun, or use fsdp full"
        )
    names = ("replicate", "shard")
    return init_device_mesh(device, (count // of_node, of_node), mesh_dim_names=names)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers says must not be split."""
    lists = (getattr(module, "_no_split_modules", None) for module in model.modules())
    names = {name for names in lists for name in names or ()}
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(
            f"{type(model).__name__} does not name its blocks (_no_split_modules), which fsdp "
            "shards: leave fsdp out, or use deepspeed"
        )
    return found


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that are trained, each once, in the parts of this process."""
    state = model.state_dict()  # which also frees what an evaluation left gathered
    return {name: state[name] for name, p in model.named_parameters() if p.requires_grad}


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimizer states; all processes call this, and each writes its parts."""
    is_alone = not dist.is_initialized()
    rank = 0 if is_alone else dist.get_rank()
    if rank == 0:  # what there is is of a run that was killed while it saved, or replaced now
        (folder.parent / TRAINER_STATE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    if not is_alone:  # the others make it
        dist.barrier()
    states: dict[str, Any] = {"model": trained_weights(model)}  # first, see there
    states["optimizer"] = get_optimizer_state_dict(model, optimizer)
    dcp.save(states, checkpoint_id=folder)
    files = {path.name: facts(path) for path in folder.glob(f"__{rank}_*")}
    gathered = [files]
    if not is_alone:
        gathered = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, files)
    if rank == 0:
        whole = {METADATA: facts(folder / METADATA)}
        write_record(folder, whole | {k: v for each in gathered for k, v in each.items()})


def load_shards(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Read what `save_shards` wrote, in as many processes as there are now.

    Raises:
        UserError: it is damaged, or of something else; nothing in it is run.
    """
    states: dict[str, Any] = {"model": trained_weights(model)}
    if optimizer is not None:
        states["optimizer"] = get_optimizer_state_dict(model, optimizer)
    load_states(states, folder)  # weights in place
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, states["optimizer"])


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
