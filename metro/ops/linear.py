"""Linear layers: one without gradients by oneDNN on the CPU, and several of one input.

PyTorch multiplies float32 by MKL, which serves Intel's CPUs best: on AMD's with AVX-512 oneDNN
takes a tenth less time for all but small matrices, and sums in float32 in an order of its own (at
a width of 768 its error is 3.7e-7, MKL's 2.5e-7). In bfloat16 PyTorch asks oneDNN itself, but first
copies the bias to every row and then adds the product; in :func:`linear` the product adds the bias,
and applies ReLU, before it writes.

Of several layers, as queries, keys and values are, PyTorch computes each by itself, and going back
adds up their gradients of the input: with I layers 3 (I - 1) N D elements are read and written for
nothing but sums, 150 MB (31 us at 4.8 TB/s) for queries, keys and values of 16k tokens at a width
of 768 in half precision. In :func:`packed_linear` the products themselves add up.

Weights stay the parameters they are, so that the state dict, optimisers, conversions and
DistributedDataParallel know nothing of this. ``packed`` puts copies of them together in every
forward pass and computes one product: that moves 2 I D^2 elements (7 MB above) and saves reading
the input I - 1 times (50 MB), which pays from 2 I / (I - 1) D rows on. Packed weights are not kept:
what writes to a parameter by ``.data``, as fairseq does after every update in half precision,
leaves no trace by which one could know that they are old.

Lower bound: 6 N D O FLOPs; forward it reads N D elements and writes N O.

Shapes: N rows (tokens), D width, O outputs of all layers together.
"""

import functools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from metro.ops.dispatch import (
    cast_for_autocast,
    check_one_type,
    computed_type,
    is_eager_cpu,
    is_eager_cuda,
    is_tracked,
)

CPU_INFO = Path("/proc/cpuinfo")
LEAST_WEIGHT = 2**17
"""Numbers of a weight of float32 from which oneDNN is faster: it writes a program for each number
of rows, which takes as long as the product of a smaller weight (128 x 128: 0.4 ms)."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    has_relu: bool = False,
) -> torch.Tensor:
    """``F.linear(x, weight, bias)``, with ``relu`` behind it where asked for.

    Where a derivative is asked for, and where oneDNN is not faster, it is that.

    Args:
        x: (..., D).
        weight: O,D, also a transposed one: ``linear(grad, weight.T)`` is ``grad @ weight``.
        bias: O.
    """
    if not takes_onednn(x, weight, bias):
        out = F.linear(x, weight, bias)
        return out.relu_() if has_relu else out
    activation = "relu" if has_relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def linear_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Write ``F.linear(x, weight)`` of a matrix, without gradients, to ``out``."""
    if takes_onednn(x, weight):
        out.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.T, out=out)


def takes_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Check that oneDNN may compute the layer and is the faster way.

    It takes transposed matrices, but none that is empty or repeats one row, and only biases without
    gaps.
    """
    given = [x, weight] if bias is None else [x, weight, bias]
    if not is_eager_cpu(x) or torch.jit.is_tracing() or is_tracked(*given):
        return False
    if {each.dtype for each in given} != {computed_type(x)}:
        return False
    if any(type(each) not in (torch.Tensor, torch.nn.Parameter) for each in given):
        return False
    if not all(each.numel() and 0 not in each.stride() for each in given):
        return False
    if bias is not None and not bias.is_contiguous():
        return False
    is_large = x.dtype != torch.float32 or weight.numel() >= LEAST_WEIGHT
    return is_large and bool(torch.backends.mkldnn.enabled) and onednn_is_faster(x.dtype)


@functools.cache
def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies such numbers faster by oneDNN than by ``F.linear``."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_supported():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not a documented operation
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # Linux names the CPU's vendor; other systems are taken for Intel's.
    return CPU_INFO.is_file() and "AuthenticAMD" in CPU_INFO.read_text("utf-8", "replace")


def packed_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    impl: str = "auto",
) -> list[torch.Tensor]:
    """``[F.linear(x, w, b) for w, b in zip(weights, biases)]``.

    Args:
        x: (..., D).
        weights, biases: for each layer its outputs by D, and its outputs.
        impl: ``reference`` (PyTorch's), ``summed`` (the gradient of ``x`` is summed by the
            products), ``packed`` (that, and one product forward, whose parts are returned), or
            ``auto``: on GPUs ``packed`` where there are rows enough and else ``summed``, on
            the CPU ``summed``; ``reference`` inside ``torch.compile`` and, on GPUs, for one layer.

    Raises:
        ValueError: an unknown ``impl``, inputs of several types outside autocast.
    """
    if impl == "auto":
        impl = best_impl(x, len(weights))
    if impl == "reference":
        return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    if impl not in ("summed", "packed"):
        raise ValueError(f"impl is {impl!r}; use 'auto', 'reference', 'summed' or 'packed'")
    check_one_type(x, *weights, *biases)
    (x,) = cast_for_autocast(x)
    return list(PackedLinear.apply(impl == "packed", x, *weights, *biases))


def best_impl(x: torch.Tensor, num_layers: int) -> str:
    if is_eager_cpu(x):
        return "summed"
    if not is_eager_cuda(x) or num_layers == 1:
        return "reference"
    *leading, width = x.shape
    return "packed" if packing_pays(math.prod(leading), width, num_layers) else "summed"


def packing_pays(num_rows: int, width: int, num_layers: int) -> bool:
    """Compare reading the input once more per layer with copying the weights."""
    return (num_layers - 1) * num_rows > 2 * num_layers * width


class PackedLinear(torch.autograd.Function):
    """Keeps the input and the weights as they were given: under autocast not the rounded ones."""

    @staticmethod
    def forward(ctx, is_packed, x, *parameters):
        ctx.save_for_backward(x, *parameters[: len(parameters) // 2])
        parameters = [parameter.to(x.dtype) for parameter in parameters]
        weights = parameters[: len(parameters) // 2]
        biases = parameters[len(weights) :]
        if not is_packed:
            return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        out = F.linear(x, torch.cat(weights), torch.cat(biases))
        return out.split([len(w) for w in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        x_ND, grads = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        needs_x, *needs = ctx.needs_input_grad[1:]
        grad_x = None
        if needs_x:
            grad_x = linear(grads[0], weights[0].T.to(x.dtype))
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(grad, weight.to(x.dtype))
            grad_x = grad_x.view_as(x)
        of_parameters = [partial(torch.mm, grad.T, x_ND) for grad in grads]
        of_parameters += [partial(torch.sum, grad, 0) for grad in grads]
        computed = (
            compute() if needed else None
            for compute, needed in zip(of_parameters, needs, strict=True)
        )
        return None, grad_x, *computed
