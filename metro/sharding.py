"""What all know of sharded training: its options, and tensors of which a process has a part.

Nothing heavy is imported here.
"""

from dataclasses import dataclass
from typing import Any

from metro.utils.messages import UserError
from metro.utils.settings import Settings, option

SHARDS = "shards"
"""Folder of a sharded checkpoint-N with the parts of all processes."""


@dataclass(kw_only=True)
class ShardingSettings(Settings):
    """Options that share weights, gradients and optimizer states among processes."""

    fsdp: str | None = option(
        None,
        "Shard with FSDP2, over all processes (full) or those of a node (hybrid).",
        choices=("full", "hybrid"),
        section="Sharding",
    )
    fsdp_offload: bool = option(False, "Keep the shards in the CPU's memory.")
    deepspeed: str | None = option(None, "Shard with DeepSpeed, as this JSON file says.")

    def check_sharding(self) -> None:
        """Refuse two engines, and an option of one that is not used."""
        if self.fsdp and self.deepspeed:
            raise UserError("fsdp and deepspeed both shard the model: give one")
        if self.fsdp_offload and not self.fsdp:
            raise UserError("fsdp_offload is an option of fsdp: add --fsdp full")


def local(tensor: Any) -> Any:
    """Return this process's part of a sharded tensor (``DTensor``); any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Any:
    """Gather a sharded tensor, in all processes at once; any other stays as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
