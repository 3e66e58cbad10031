"""Which implementation ``impl="auto"`` means."""

import torch


def is_eager_cpu(x: torch.Tensor) -> bool:
    """Whether the CPU paths written here apply: float32, on the CPU, not in ``torch.compile``."""
    is_float32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return is_float32_on_cpu and not torch.compiler.is_compiling()
