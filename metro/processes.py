"""Several processes (``torchrun``) that share a task; one process without it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed

from metro.models.placement import own_gpus
from metro.utils.messages import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The group of processes, and the rank of this one in it."""

    rank: int
    count: int
    device: torch.device
    """Of this process."""
    owns_group: bool = False
    """The process group was made here; `close` leaves any other as it is."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce (sum). Exact if at most one rank holds a non-zero value per element."""
        if self.count == 1:
            return values
        on_device = values.to(self.device)
        torch.distributed.all_reduce(on_device)
        return on_device.to(values.device)

    def on_first(self, make: Callable[[], Value]) -> Value | None:
        """Call ``make`` in the first process; the others have None.

        Raises:
            UserError: ``make`` raised one; every process does then, and none waits for the others.
        """
        value, problem = None, None
        if self.is_first:
            try:
                value = make()
            except UserError as error:
                problem = error
        if (message := self._broadcast(problem and str(problem))) is not None:
            raise problem or UserError(message)
        return value

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Call ``make`` in the first process and broadcast its value, or its UserError."""
        return self._broadcast(self.on_first(make))

    def _broadcast(self, value: Any) -> Any:
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def close(self) -> None:
        if self.owns_group:
            torch.distributed.destroy_process_group()


def join_processes(device: str | None = None, device_map: str | None = None) -> Processes:
    """Join the processes that ``torchrun`` started.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``...; by default a GPU per process if there are any.
        device_map: with one, each process has an equal share of the GPUs, the first of which is
            its device.

    Raises:
        UserError: the device is not available.
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
        first = own_gpus(torch.cuda.device_count()).start if device_map else local
        chosen = torch.device("cuda", first if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(
                f"process {rank} would use {chosen}, but there are {torch.cuda.device_count()} "
                "GPUs; start fewer processes per machine"
            )
        torch.cuda.set_device(chosen)
    makes_group = count > 1 and not torch.distributed.is_initialized()
    if makes_group:
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(rank, count, chosen, owns_group=makes_group)
