"""The feed-forward network of a layer, which on the CPU keeps one tensor of its inner width.

PyTorch writes four a step: before and after the activation, and their gradients. They are the
largest of a layer, and fresh memory costs as much as several passes over it: here the
activation is in place, and its gradient exists for some rows at a time.

Floor: 12 N D F multiplications and additions, N F numbers kept.

Shapes: N rows (tokens), D width, F inner width.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from metro.ops.dispatch import is_eager_cpu

ROWS = 1024
"""Rows of which the backward pass holds the inner gradient."""


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
        impl: ``reference`` (PyTorch's), ``in_place`` (described above) or ``auto``: ``in_place``
            for float32 on the CPU.

    Raises:
        ValueError: an unknown ``impl``.
    """
    if impl == "auto":
        impl = "in_place" if is_eager_cpu(x) else "reference"
    if impl == "reference":
        return F.linear(F.linear(x, weight_in, bias_in).relu(), weight_out, bias_out)
    if impl == "in_place":
        return InPlaceFeedForward.apply(x, weight_in, bias_in, weight_out, bias_out)
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference' or 'in_place'")


class InPlaceFeedForward(torch.autograd.Function):
    """Keeps the activations, from which the next product and the activation's gradient follow."""

    @staticmethod
    def forward(ctx, x, weight_in, bias_in, weight_out, bias_out):
        inner = F.linear(x, weight_in, bias_in).relu_()
        ctx.save_for_backward(x, inner, weight_in, weight_out)
        return F.linear(inner, weight_out, bias_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inner, weight_in, weight_out = ctx.saved_tensors
        x_ND, inner_NF, grad_ND = (t.flatten(0, -2) for t in (x, inner, grad))
        grad_x = torch.empty_like(x_ND)
        grad_in, grad_bias_in = torch.zeros_like(weight_in), weight_in.new_zeros(len(weight_in))
        for first in range(0, len(x_ND), ROWS):
            rows = slice(first, first + ROWS)
            grad_inner = torch.mm(grad_ND[rows], weight_out)
            torch.ops.aten.threshold_backward(
                grad_inner, inner_NF[rows], 0.0, grad_input=grad_inner
            )
            torch.mm(grad_inner, weight_in, out=grad_x[rows])
            grad_in.addmm_(grad_inner.T, x_ND[rows])
            grad_bias_in += grad_inner.sum(0)
        return grad_x.view_as(x), grad_in, grad_bias_in, grad_ND.T @ inner_NF, grad_ND.sum(0)
