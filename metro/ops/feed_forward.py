"""The feed-forward network of a layer, which keeps one tensor of its inner width.

PyTorch writes four a step: before and after the activation, and their gradients. They are the
largest of a layer. On the CPU fresh memory costs as much as several passes over it: here the
activation is in place, and its gradient exists for some rows at a time; where no gradient is asked
for, so do the activations.

On a GPU the product applies the activation before it writes (cuBLASLt's epilogue): 2 N F elements
less are read and written, 0.2 GB or 42 us at 4.8 TB/s for 16k tokens and F = 3,072 in half
precision, beside 0.6 ms of products; the gradient's mask, 3 N F, is in place. To save that pass as
well, a kernel written by hand would have to multiply as fast as cuBLAS does.

Lower bound: 12 N D F FLOPs, N F elements kept.

Shapes: N rows (tokens), D width, F inner width.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from metro.ops.dispatch import (
    cast_for_autocast,
    check_one_type,
    is_eager_cpu,
    is_eager_cuda,
    is_tracked,
)
from metro.ops.linear import linear, linear_into

ROWS = 1024
"""Rows of which the CPU holds the inner gradient, or without gradients the activations."""


def feed_forward(
    x: torch.Tensor,
    weight_in: torch.Tensor,
    bias_in: torch.Tensor,
    weight_out: torch.Tensor,
    bias_out: torch.Tensor,
    impl: str = "auto",
) -> torch.Tensor:
    """``F.linear(F.linear(x, weight_in, bias_in).relu(), weight_out, bias_out)``.

    Args:
        x: (..., D).
        weight_in, bias_in: F,D and F. weight_out, bias_out: D,F and D.
        impl: ``reference`` (PyTorch's), ``in_place`` and ``epilogue`` (described above) or
            ``auto``: ``in_place`` on the CPU, ``epilogue`` on GPUs, ``reference`` inside
            ``torch.compile``.

    Raises:
        ValueError: an unknown ``impl``, inputs of several types outside autocast.
    """
    if impl == "auto":
        impl = "reference"
        if is_eager_cpu(x):
            impl = "in_place"
        elif is_eager_cuda(x):
            impl = "epilogue"
    if impl == "reference":
        return F.linear(F.linear(x, weight_in, bias_in).relu(), weight_out, bias_out)
    if impl not in ("in_place", "epilogue"):
        raise ValueError(f"impl is {impl!r}; use 'auto', 'reference', 'in_place' or 'epilogue'")
    check_one_type(x, weight_in, bias_in, weight_out, bias_out)
    (x,) = cast_for_autocast(x)
    given = (weight_in, bias_in, weight_out, bias_out)
    is_free = not is_tracked(x, *given) and not torch.jit.is_tracing()
    if impl == "in_place" and is_free:
        return without_gradients(x, *(each.to(x.dtype) for each in given))
    return InPlaceFeedForward.apply(x, *given, impl == "epilogue")


class InPlaceFeedForward(torch.autograd.Function):
    """Keeps the activations, from which the next product and the activation's gradient follow.

    Of the weights it keeps what it was given, under autocast not the rounded ones.
    """

    @staticmethod
    def forward(ctx, x, *given):
        *parameters, ctx.has_epilogue = given
        weight_in, bias_in, weight_out, bias_out = (p.to(x.dtype) for p in parameters)
        if ctx.has_epilogue:
            inner_NF = torch._addmm_activation(bias_in, x.flatten(0, -2), weight_in.T)
            inner = inner_NF.view(*x.shape[:-1], len(weight_in))
        else:
            inner = linear(x, weight_in, bias_in, has_relu=True)
        ctx.save_for_backward(x, inner, parameters[0], parameters[2])
        return linear(inner, weight_out, bias_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inner, *weights = ctx.saved_tensors
        weight_in, weight_out = (weight.to(x.dtype) for weight in weights)
        x_ND, inner_NF, grad_ND = (t.flatten(0, -2) for t in (x, inner, grad))
        grad_x = torch.empty_like(x_ND)
        grad_in, grad_bias_in = torch.zeros_like(weight_in), weight_in.new_zeros(len(weight_in))
        # A GPU is filled by all rows at once, and half precision would round once for each chunk.
        in_chunks = not ctx.has_epilogue and x.dtype == torch.float32
        step = ROWS if in_chunks else max(len(x_ND), 1)
        for first in range(0, len(x_ND), step):
            rows = slice(first, first + step)
            grad_inner = linear(grad_ND[rows], weight_out.T)
            torch.ops.aten.threshold_backward(
                grad_inner, inner_NF[rows], 0.0, grad_input=grad_inner
            )
            linear_into(grad_x[rows], grad_inner, weight_in.T)
            grad_in.addmm_(grad_inner.T, x_ND[rows])
            grad_bias_in += grad_inner.sum(0)
        left_DN = grad_ND.T
        if x.device.type == "cpu" and not in_chunks:
            left_DN = left_DN.contiguous()  # with AMX half the time, the copy included
        grad_out, grad_bias_out = left_DN @ inner_NF, grad_ND.sum(0)
        return grad_x.view_as(x), grad_in, grad_bias_in, grad_out, grad_bias_out, None


def without_gradients(x, weight_in, bias_in, weight_out, bias_out) -> torch.Tensor:
    """Compute few rows at a time, whose activations a core's cache keeps."""
    out = [
        linear(linear(rows_CD, weight_in, bias_in, has_relu=True), weight_out, bias_out)
        for rows_CD in x.reshape(-1, x.shape[-1]).split(ROWS)
    ]
    return torch.cat(out).view(*x.shape[:-1], len(weight_out))
