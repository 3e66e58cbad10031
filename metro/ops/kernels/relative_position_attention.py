"""Triton kernels of :mod:`metro.ops.relative_position_attention`, after Dao et al. (2022, 2023).

``forward_kernel`` goes through the keys for a block of queries, and keeps of the weights the
logarithm of their sum. Going back the weights are computed again: by ``key_gradient_kernel`` for a
block of keys, by ``query_gradient_kernel`` for a block of queries, and where the bias is trained by
``bias_gradient_kernel``. Nothing is added atomically: the same inputs give the same bits.

- The bias is read by distance: a value per distance and head, which a tile takes from the cache; a
  tile of distances beyond the last bucket takes one number.
  Its gradient sums diagonals. The tiles on one diagonal of tiles, in all sequences of the batch,
  have their diagonals at the same distances, so they are added up first and summed along the
  diagonals once. This costs two more products a tile than in ``query_gradient_kernel``, where each
  tile would have to be rearranged in shared memory, or added atomically: 100 M additions to 12 k
  addresses at 32 sequences of 512 tokens and 12 heads. Queries at given positions are sorted into
  such tiles by a product with ones and zeros.
- Dropout takes a number of PyTorch's generator (on GPUs Philox) for each query and each key of a
  head, and keeps a pair by the mixed bits of their sum (a round of MurmurHash3): 5 instructions a
  weight, where seven rounds of Philox for each would take 70, more than all else here. Any three
  pairs of a rectangle of queries and keys are independent; the mixing unties the fourth.

Lower bound: forward 4 B H T S K FLOPs, half of them where causal; backward 10, of which these
kernels do 14, and 4 more for the bias. Bytes: q, k, v, out and their gradients once. At
T = S = 512 in half precision that is 256 operations a byte forward and more backward: as many as a
GPU can feed. The exponential of each weight, 16 a cycle in a multiprocessor, takes as long as its
forward products at K = 64.

Sums are in float32; float32 inputs are not rounded to tf32.

PyTorch's FlexAttention is the rival. It has no dropout and adds to the bias's gradient atomically;
whether these kernels stay is decided by ``benchmarks/ops.py``, which measures both on a GPU.

Shapes: B batch, H heads, T queries, S keys, K head width, N = 2 S - 1 distances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from metro.ops.kernels.attention_backward import (
    delta_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from metro.ops.kernels.attention_bias import bias_gradient_kernel
from metro.ops.kernels.attention_forward import bias_kernel, forward_kernel, key_range_kernel

TILES_PER_PROGRAM = 16
"""Tiles that a program of ``bias_gradient_kernel`` adds up."""
LOG2_E = 1.4426950408889634


def block_sizes(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles and warps for Ampere and later, whose shared memory and registers they fit.

    Not measured yet. In float32 some kernels keep a part of their registers in memory.
    """
    block_k = max(16, triton.next_power_of_2(width))
    is_half, is_wide = dtype.itemsize == 2, block_k > 64
    num_warps, num_stages = 8 if is_half else 4, 2
    if kernel == "bias":
        blocks = {"BLOCK": 64 if is_half else 32}
    else:
        if not is_half:
            block_t, block_s = 32, 32
        elif kernel == "forward":
            block_t, block_s, num_stages = 128, 64, 2 if is_wide else 3
        elif kernel == "key_gradient":
            block_t, block_s = 64, 64 if is_wide else 128
        else:
            block_t, block_s = 128, 32 if is_wide else 64
        if block_k > 128:
            block_t, block_s = max(16, block_t // 2), max(16, block_s // 2)
        blocks = {"BLOCK_T": block_t, "BLOCK_S": block_s}
    return blocks | {"BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages}


class Inputs(NamedTuple):
    """Inputs of the kernels, besides gradients; ``None`` where there is none."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    """H,N + 2 float32, see ``bias_kernel``; in units of log 2."""
    key_mask: torch.Tensor | None
    key_range: torch.Tensor | None
    positions: torch.Tensor | None
    query_random: torch.Tensor | None
    key_random: torch.Tensor | None

    def options(self, is_causal: bool, dropout: float) -> dict:
        """Return sizes, strides and numbers as every kernel of a tile takes them."""
        numbers = {"T": self.q.shape[2], "S": self.k.shape[2], "H": self.q.shape[1]}
        for name, x, row in (("q", self.q, "t"), ("k", self.k, "s"), ("v", self.v, "s")):
            of_axes = zip(("b", "h", row), x.stride(), strict=False)
            numbers |= {f"{name}_{axis}": stride for axis, stride in of_axes}
        return numbers | {
            "scale": self.q.shape[-1] ** -0.5 * LOG2_E,
            "threshold": min(round(dropout * 2**32), 2**32 - 1),
            "kept_scale": 1.0 / (1.0 - dropout),
            "K": self.q.shape[-1],
            "IS_CAUSAL": is_causal,
        }


def prepare(q, k, v, bias, key_mask, positions, random) -> Inputs:
    """As the kernels read them."""
    (batch_size, num_heads, num_queries, _), num_keys = q.shape, k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if bias is not None:
        scaled = q.new_empty(num_heads, 2 * num_keys + 1, dtype=torch.float32)
        strides = bias.stride()
        bias_kernel[(num_heads,)](bias, scaled, 2 * num_keys - 1, *strides, LOG2_E, BLOCK=1024)
        bias = scaled
    key_range = None
    if key_mask is not None:
        key_mask = key_mask.bool().expand(batch_size, num_keys).contiguous().view(torch.uint8)
        key_range = torch.empty(batch_size, 2, dtype=torch.int32, device=q.device)
        key_range_kernel[(batch_size,)](key_mask, key_range, num_keys, BLOCK=1024)
    of_queries = of_keys = None
    if random is not None:
        num_rows = batch_size * num_heads
        of_queries, of_keys = random.split([num_rows * num_queries, num_rows * num_keys])
    if positions is not None:
        positions = positions.expand(batch_size, num_queries).contiguous()
    return Inputs(q, k, v, bias, key_mask, key_range, positions, of_queries, of_keys)


def by_position(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised B,H,T,K laid out in memory as B,T,H,K."""
    batch_size, num_heads, length, width = x.shape
    return x.new_empty(batch_size, length, num_heads, width).transpose(1, 2)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    random: torch.Tensor | None,
    is_causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, B,H,T,K laid out as B,T,H,K, and log 2 of each query's sum, B,H,T.

    Args:
        random: int32, B H (T + S) random numbers; without them nothing is dropped.
        The others: as of :func:`metro.ops.relative_position_attention.relative_position_attention`.
    """
    out, lse = by_position(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):
        given = prepare(q, k, v, bias, key_mask, positions, random)
        sizes = block_sizes("forward", q.shape[-1], q.dtype)
        grid = (triton.cdiv(q.shape[2], sizes["BLOCK_T"]) * q.shape[0] * q.shape[1],)
        options = given.options(is_causal, dropout)
        forward_kernel[grid](*given, out, lse, **options, **sizes)
    return out, lse


def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    random: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    is_causal: bool,
    dropout: float,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the bias (float32; empty where it is not needed)."""
    (batch_size, num_heads, num_queries, width), num_keys = q.shape, k.shape[2]
    grad_q, grad_k, grad_v = by_position(q), by_position(k), by_position(v)
    delta, grad_bias = torch.empty_like(lse), lse.new_empty(0)
    out, grad_out = out.transpose(1, 2).contiguous(), grad_out.transpose(1, 2).contiguous()
    num_rows = batch_size * num_heads
    with torch.cuda.device_of(q):
        given = prepare(q, k, v, bias, key_mask, positions, random)
        options = given.options(is_causal, dropout)
        sizes = block_sizes("query_gradient", width, q.dtype)
        grid = (triton.cdiv(num_queries, sizes["BLOCK_T"]) * num_rows,)
        only_delta = {name: sizes[name] for name in ("BLOCK_T", "BLOCK_K")}
        delta_kernel[grid](out, grad_out, delta, num_queries, num_heads, K=width, **only_delta)
        query_gradient_kernel[grid](*given, grad_out, lse, delta, grad_q, **options, **sizes)
        sizes = block_sizes("key_gradient", width, q.dtype)
        grid = (triton.cdiv(num_keys, sizes["BLOCK_S"]) * num_rows,)
        key_gradient_kernel[grid](*given, grad_out, lse, delta, grad_k, grad_v, **options, **sizes)
        if needs_bias:
            grad_bias = bias_gradient(given, grad_out, lse, delta, options)
    return grad_q, grad_k, grad_v, grad_bias


def bias_gradient(given: Inputs, grad_out, lse, delta, options: dict) -> torch.Tensor:
    """H,N float32."""
    (batch_size, num_heads, num_queries, width), num_keys = given.q.shape, given.k.shape[2]
    num_rows = num_queries if given.positions is None else num_keys
    sizes = block_sizes("bias", width, given.q.dtype)
    block = sizes["BLOCK"]
    row_blocks, key_blocks = triton.cdiv(num_rows, block), triton.cdiv(num_keys, block)
    num_diagonals = row_blocks + key_blocks - 1
    num_splits = triton.cdiv(batch_size * min(row_blocks, key_blocks), TILES_PER_PROGRAM)
    partials = lse.new_empty(num_splits, num_heads, num_diagonals, 2, block)
    bias_gradient_kernel[(num_splits * num_diagonals * num_heads,)](
        *given,
        grad_out,
        lse,
        delta,
        partials,
        B=batch_size,
        num_splits=num_splits,
        TILES=TILES_PER_PROGRAM,
        **options,
        **sizes,
    )
    before, after = partials.sum(0).unbind(2)
    # Where a diagonal's second entry and the next one's first entry are of the same distances.
    of_distances = lse.new_zeros(num_heads, (num_diagonals + 1) * block)
    of_distances[:, :-block] = before.flatten(1)
    of_distances[:, block:] += after.flatten(1)
    first, num_seen = row_blocks * block - num_rows + 1, num_rows + num_keys - 1
    grad_bias = lse.new_zeros(num_heads, 2 * num_keys - 1)
    grad_bias[:, :num_seen] = of_distances[:, first : first + num_seen]
    return grad_bias


attention_forward_op = torch.library.custom_op(
    "metro::attention_forward", attention_forward, mutates_args=()
)
attention_backward_op = torch.library.custom_op(
    "metro::attention_backward", attention_backward, mutates_args=()
)


@attention_forward_op.register_fake
def _(q, *others):
    return by_position(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward_op.register_fake
def _(q, k, v, bias, *others):
    grad_bias = q.new_empty(bias.shape if others[-1] else 0, dtype=torch.float32)
    return by_position(q), by_position(k), by_position(v), grad_bias


class KernelAttention(torch.autograd.Function):
    """Keeps the inputs, the output, and a number for each query of each head."""

    @staticmethod
    def forward(ctx, q, k, v, bias, key_mask, positions, random, is_causal, dropout):
        # Calling an operator of torch.library takes time: only what is traced needs it.
        run = attention_forward_op if torch.compiler.is_compiling() else attention_forward
        out, lse = run(q, k, v, bias, key_mask, positions, random, is_causal, dropout)
        ctx.save_for_backward(q, k, v, bias, key_mask, positions, random, out, lse)
        ctx.is_causal, ctx.dropout = is_causal, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        run = attention_backward_op if torch.compiler.is_compiling() else attention_backward
        bias, needs_bias = ctx.saved_tensors[3], ctx.needs_input_grad[3]
        grad_q, grad_k, grad_v, grad_bias = run(
            *ctx.saved_tensors, grad_out, ctx.is_causal, ctx.dropout, needs_bias
        )
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_q, grad_k, grad_v, grad_bias, None, None, None, None, None


def attend(q, k, v, bias, key_mask, is_causal, positions, dropout) -> torch.Tensor:
    """As :func:`metro.ops.relative_position_attention.relative_position_attention`."""
    random = None
    if dropout:
        count = q.shape[0] * q.shape[1] * (q.shape[2] + k.shape[2])
        random = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=q.device)
    # Positions matter only to the bias and to what is visible.
    if bias is None and not is_causal:
        positions = None
    return KernelAttention.apply(q, k, v, bias, key_mask, positions, random, is_causal, dropout)
