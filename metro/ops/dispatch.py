"""Choose the implementation that ``impl="auto"`` means."""

import functools
import importlib.util
import json
import os
from pathlib import Path

import torch
from torch.autograd import forward_ad

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types that the kernels take; sums are in float32."""
LEAST_BF16_WIDTH = 256
"""Narrowest model for which bfloat16 pays: most of the time of others is not products."""


def is_eager_cpu(x: torch.Tensor) -> bool:
    """Check that the CPU paths apply: float32, autocast to bfloat16, not in ``torch.compile``."""
    is_ours = x.device.type == "cpu" and computed_type(x) in (torch.float32, torch.bfloat16)
    return is_ours and not torch.compiler.is_compiling()


def cpu_multiplies_bf16() -> bool:
    """Check for instructions for products of bfloat16, which make them faster than float32's."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def gpu_multiplies_bf16(device: torch.device | str | int | None = None) -> bool:
    """Check that a GPU has products of bfloat16; those before Ampere only emulate them."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def attends_in_float32(x: torch.Tensor) -> bool:
    """Check for attention in bfloat16 on a CPU without units for it (AMX).

    PyTorch's flash attention multiplies in float32 there, whatever the type, and rounds in between:
    in float32 its two passes take half to a third of the time.
    """
    in_bf16 = is_eager_cpu(x) and computed_type(x) == torch.bfloat16
    return in_bf16 and not torch.cpu._is_amx_tile_supported()


def is_eager_cuda(x: torch.Tensor) -> bool:
    """Check that the GPU paths apply: in ``torch.compile`` the compiler writes its own."""
    is_ours = x.device.type == "cuda" and x.dtype in KERNEL_TYPES
    return is_ours and not torch.compiler.is_compiling()


@torch.compiler.assume_constant_result  # the compiler cannot trace it: it is asked once for a graph
def takes_kernel(
    op: str, device: torch.device, dtype: torch.dtype, width: int, *flags: str
) -> bool:
    """Decide whether ``auto`` means an operation's kernel rather than PyTorch's operations.

    On GPUs of Ampere or later with Triton, where a measurement that comes with METRO shows the
    kernel faster on this generation of GPUs and in this type, and once it has proved itself there
    (:mod:`metro.ops.kernels.self_check`, which see for the arguments). The environment's
    METRO_TRITON overrules both: 0 means never, 1 wherever a kernel can run.

    Raises:
        ValueError: another value of METRO_TRITON.
    """
    return not reason_against_kernel(op, device, dtype, width, *flags)


def reason_against_kernel(
    op: str, device: torch.device, dtype: torch.dtype, width: int, *flags: str
) -> str:
    """Say why :func:`takes_kernel` is false; nothing where it is true."""
    setting = os.environ.get("METRO_TRITON", "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"METRO_TRITON is {setting!r}; use 0 (no kernels) or 1 (all), or unset it")
    if device.type != "cuda" or dtype not in KERNEL_TYPES:
        return "a kernel takes half or single precision on a GPU"
    if setting == "0":
        return "METRO_TRITON is 0"
    if reason := reason_against_device(device):
        return reason
    if setting == "1":
        return ""
    given = tuple(sorted(flags))
    gain = measured_gain(op, compute_capability(device), dtype, given)
    if gain <= 1.0:
        return f"measured to be {gain:.2f} times as fast" if gain else "not measured here"
    from metro.ops.kernels.self_check import is_trusted

    return "" if is_trusted(op, device, dtype, width, given) else "it has not proved itself"


def reason_against_device(device: torch.device) -> str:
    """Say why no kernel can run on a GPU; nothing where they can."""
    if not is_triton_installed():
        return "the package triton is not installed"
    return "" if compute_capability(device) >= (8, 0) else "the GPU is older than Ampere"


def measured_gain(
    op: str, capability: tuple[int, int], dtype: torch.dtype, flags: tuple[str, ...]
) -> float:
    """Times PyTorch's speed that a kernel reached on GPUs of this generation; 0 if not measured.

    ``measured.json`` is written by ``benchmarks.ops`` from the results in ``benchmarks/results``.
    """
    of_generation = measured_gains().get(f"sm_{capability[0]}x", {})
    return of_generation.get(case_name(op, dtype, flags), 0.0)


def case_name(op: str, dtype: torch.dtype, flags: tuple[str, ...]) -> str:
    """Name a case of an operation, as results of ``benchmarks.ops`` do."""
    return " ".join([op, str(dtype).removeprefix("torch."), *flags])


@functools.cache
def measured_gains() -> dict[str, dict[str, float]]:
    """Generation of GPUs -> case -> gain."""
    return json.loads((Path(__file__).parent / "kernels" / "measured.json").read_text("utf-8"))


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
    if not torch.is_autocast_enabled(x.device.type):
        return [x, *others]
    return [None if y is None else y.to(computed_type(x)) for y in (x, *others)]


def check_one_type(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Outside ``torch.autocast`` the inputs of a product are of one type, as PyTorch demands.

    Raises:
        ValueError: they are not, naming their types.
    """
    types = [y.dtype for y in (x, *others) if y is not None]
    if len({*types}) > 1 and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"inputs are {', '.join(map(str, types))}; cast them to one type")


def is_tracked(*given: torch.Tensor | None) -> bool:
    """Check that a derivative may be asked for of what is computed from these."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def computed_type(x: torch.Tensor) -> torch.dtype:
    """The type in which a product with ``x`` is computed, which ``torch.autocast`` decides."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
