"""Choose the implementation that ``impl="auto"`` means."""

import functools
import importlib.util
import os

import torch

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types that the kernels take; sums are in float32."""


def is_eager_cpu(x: torch.Tensor) -> bool:
    """Check that the CPU paths apply: float32 (no autocast), not in ``torch.compile``."""
    is_float32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    is_traced = torch.compiler.is_compiling()
    return is_float32_on_cpu and not is_traced and not torch.is_autocast_enabled("cpu")


def is_eager_cuda(x: torch.Tensor) -> bool:
    """Check that the GPU paths apply: in ``torch.compile`` the compiler writes its own."""
    is_ours = x.device.type == "cuda" and x.dtype in KERNEL_TYPES
    return is_ours and not torch.compiler.is_compiling()


@torch.compiler.assume_constant_result  # the compiler cannot trace it: it is asked once for a graph
def has_kernels(device: torch.device) -> bool:
    """Check whether ``auto`` may choose kernels: on GPUs of Ampere or later, which they are for.

    Triton must be installed, and METRO_TRITON not be 0. Does not synchronise with the GPU.
    """
    if device.type != "cuda" or os.environ.get("METRO_TRITON") == "0":
        return False
    return is_triton_installed() and compute_capability(device) >= (8, 0)


@functools.cache
def is_triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def check_kernel(x: torch.Tensor) -> None:
    """Refuse ``impl="triton"`` where no kernel can run.

    Raises:
        ValueError: without Triton, without a GPU (Triton's interpreter, which runs kernels on the
            CPU to test them, does instead), or in float64.
    """
    if not is_triton_installed():
        raise ValueError(
            "impl is 'triton', but the package triton is not installed: install it, or use impl "
            "'auto'"
        )
    if x.dtype not in KERNEL_TYPES:
        raise ValueError(f"impl 'triton' sums in float32, the input is {x.dtype}; use 'reference'")
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("impl 'triton' needs a GPU, the input is on the CPU; use 'auto'")


def cast_for_autocast(x: torch.Tensor, *others: torch.Tensor | None) -> list:
    """Cast as PyTorch's products do inside ``torch.autocast``; the gradients are cast back."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)
    return [None if y is None else y.to(dtype) for y in (x, *others)]
