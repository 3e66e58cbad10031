"""Several processes (``torchrun``) that share an evaluation; one process without it."""

import os
from typing import Any, NamedTuple

import torch
import torch.distributed

from metro.utils.messages import UserError


class Processes(NamedTuple):
    """Which process this is."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, exact where all but one hold 0."""
        if self.count == 1:
            return values
        there = values.to(self.device)
        torch.distributed.all_reduce(there)
        return there.to(values.device)

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def close(self) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()


def join_processes(device: str | None = None) -> Processes:
    """Join the processes that ``torchrun`` started.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``...; by default a GPU per process if there are any.

    Raises:
        ValueError: the device is not there.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device is {device!r}; use cpu, cuda or cuda:N") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device is {device!r}, but there is no GPU here; use cpu")
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(
                f"process {rank} would use {chosen}, but there are {torch.cuda.device_count()} "
                "GPUs; start fewer processes per machine"
            )
        torch.cuda.set_device(chosen)
    if count > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(rank, count, chosen)
