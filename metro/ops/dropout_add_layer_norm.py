"""Dropout, residual and LayerNorm in one pass: the end of every layer of a post-LayerNorm model.

PyTorch takes three passes: forward it reads 4 N D numbers and writes 3 N D, backward it reads 5 N D
(LayerNorm's two kernels read the same twice) and writes 2 N D, and a byte for each number says what
was dropped. The kernels read 2 N D and write N D forward, read 3 N D and write 2 N D (N D without
dropout) backward. They keep ``x``, which PyTorch frees, in the place of the sum; the residual is
kept anyway by the layer that reads it. What was dropped is drawn again.

On the CPU it is PyTorch's: there the passes are a few percent of a layer.

Lower bound: 8 N D elements read or written (7 without dropout), against PyTorch's 14.

Shapes: N rows (tokens), D width.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from metro.ops.dispatch import check_kernel, is_eager_cuda, takes_kernel
from metro.ops.dropout import dropout

MAX_WIDTH = 4096
"""A program holds whole rows in its registers: 512 threads with 128 each."""


def dropout_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float = 0.0,
    eps: float = 1e-5,
    training: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """``F.layer_norm(residual + F.dropout(x, p, training), (D,), weight, bias, eps)``.

    Args:
        x, residual: (..., D), also of two types, as under autocast.
        weight, bias: D.
        p: probability of dropping, for ``triton`` in steps of 2 ** -16.
        eps: added to the variance.
        training: nothing is dropped otherwise.
        impl: ``reference`` (PyTorch's, with :func:`metro.ops.dropout.dropout`), ``triton``
            (described above, sums in float32; drawn from PyTorch's generator of the device without
            waiting for it), or ``auto``: ``triton`` where
            :func:`metro.ops.dispatch.takes_kernel` says so, outside ``torch.compile``.

    Returns:
        As PyTorch's: of the wider of the two types, float32 under autocast.

    Raises:
        ValueError: an unknown ``impl``, ``triton`` where it cannot run, shapes that do not fit.
    """
    p = p if training else 0.0
    if impl == "auto":
        impl = "triton" if takes_kernels(x, residual, len(weight), p) else "reference"
    if impl == "reference":
        summed = dropout(x, p)
        if x.device.type == "cpu":  # two types in one pass are seven times as slow there
            summed = summed.to(torch.promote_types(x.dtype, residual.dtype))
        has_own_memory = x.device.type == "cpu" and summed is not x
        summed = summed.add_(residual) if has_own_memory else residual + summed
        return F.layer_norm(summed, weight.shape, weight, bias, eps)
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}; use 'auto', 'reference' or 'triton'")
    check_kernel(x)
    if x.shape != residual.shape or x.shape[-1:] != weight.shape or weight.shape != bias.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, residual, weight, bias))
        raise ValueError(f"x, residual, weight and bias are {shapes}; use (..., D) twice, D twice")
    if weight.shape[-1] > MAX_WIDTH:
        raise ValueError(f"impl 'triton' takes rows of up to {MAX_WIDTH}; use 'reference'")
    if p == 1.0:  # nothing is kept, and what is kept would be divided by 0
        return F.layer_norm(residual + x * 0.0, weight.shape, weight, bias, eps)
    return DropoutAddLayerNorm.apply(x, residual, weight, bias, p, eps)


def takes_kernels(x: torch.Tensor, residual: torch.Tensor, width: int, p: float) -> bool:
    """Decide what ``auto`` means."""
    if not is_eager_cuda(x) or width > MAX_WIDTH:
        return False
    flags = ["dropout"] * bool(p) + ["mixed"] * (x.dtype != residual.dtype)
    return takes_kernel("dropout_add_layer_norm", x.device, x.dtype, width, *flags)


class DropoutAddLayerNorm(torch.autograd.Function):
    """Keeps its inputs, and mean and reciprocal deviation of each row."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, p, eps):
        from metro.ops.kernels.dropout_add_layer_norm import normalise

        dtype = torch.promote_types(x.dtype, residual.dtype)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.float32
        seed = torch.randint(2**62, (1,), device=x.device) if p else None
        x, residual = x.contiguous(), residual.contiguous()
        out, means_N, scales_N = normalise(x, residual, weight, bias, p, eps, seed, dtype)
        ctx.save_for_backward(x, residual, weight, means_N, scales_N, seed)
        ctx.p, ctx.bias_dtype = p, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from metro.ops.kernels.dropout_add_layer_norm import normalise_backward

        x, residual, weight, means_N, scales_N, seed = ctx.saved_tensors
        grad_x, grad_residual, grad_weight, grad_bias = normalise_backward(
            grad.contiguous(), x, residual, weight, means_N, scales_N, ctx.p, seed
        )
        return (
            grad_x,
            grad_residual,
            grad_weight.to(weight.dtype),
            grad_bias.to(ctx.bias_dtype),
            None,
            None,
        )
