"""A linear layer without gradients, on the CPU by oneDNN.

PyTorch multiplies float32 by MKL, which serves Intel's CPUs best: on AMD's with AVX-512 oneDNN
takes a tenth less time, rounding as little. In bfloat16 PyTorch asks oneDNN itself, but first
copies the bias to every row and then adds the product; here the product adds the bias, and applies
ReLU, before it writes.

Lower bound: 2 N D O FLOPs.

Shapes: N rows (tokens), D width, O outputs.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from metro.ops.dispatch import computed_type, is_eager_cpu, is_tracked

CPU_INFO = Path("/proc/cpuinfo")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    has_relu: bool = False,
) -> torch.Tensor:
    """``F.linear(x, weight, bias)``, with ``relu`` behind it where asked for.

    Where a gradient is asked for, and where oneDNN is not faster, it is that.

    Args:
        x: (..., D).
        weight: O,D, also a transposed one: ``linear(grad, weight.T)`` is ``grad @ weight``.
        bias: O.
    """
    if not serves(x, weight, bias):
        out = F.linear(x, weight, bias)
        return out.relu() if has_relu else out
    activation = "relu" if has_relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def serves(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Check that oneDNN may compute the layer and is the faster way."""
    given = [x, *(each for each in parameters if each is not None)]
    if not is_eager_cpu(x) or {each.dtype for each in given} != {computed_type(x)}:
        return False
    if is_tracked(*given):
        return False
    # oneDNN takes transposed matrices, but none that is empty or repeats one row.
    is_matrix = all(each.numel() and 0 not in each.stride() for each in given)
    return is_matrix and is_faster(x.dtype)


@functools.cache
def is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies such numbers faster by oneDNN than by ``F.linear``."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_supported():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not a documented operation
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # Linux names the CPU's vendor; other systems are taken for Intel's.
    return CPU_INFO.is_file() and "AuthenticAMD" in CPU_INFO.read_text("utf-8", "replace")
