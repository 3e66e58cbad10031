"""Which implementation ``impl="auto"`` means."""

import torch


def is_eager_cpu(x: torch.Tensor) -> bool:
    """Whether the CPU paths written here apply: float32 (no autocast), not in ``torch.compile``."""
    is_float32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    is_traced = torch.compiler.is_compiling()
    return is_float32_on_cpu and not is_traced and not torch.is_autocast_enabled("cpu")
