"""Triton kernels of :mod:`metro.ops.dropout_add_layer_norm`: whole rows live in registers.

``normalise`` gives a program a tile of rows. ``normalise_backward`` gives each of few programs many
tiles, one after the other: it adds up its part of the gradients of weight and bias, and PyTorch
adds the parts, always in the same order.

What is dropped follows from the seed, the row and the column: a draw of Philox (Salmon et al.,
2011) of seven rounds is 128 bits, 16 for each of eight neighbouring columns. A draw for each column
would take longer than moving the numbers.

Shapes: N rows, D width (padded to a power of two), P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 2
"""Of a tile: as many as leave the backward pass 128 registers a thread, without spills."""
WARPS_PER_PROCESSOR = 16
"""Of the backward pass, for each multiprocessor of the GPU: as many as those registers allow."""


@triton.jit
def kept_elements(seed, rows, threshold, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """bool of a tile, False with probability ``threshold / 2 ** 16``."""
    groups = tl.arange(0, BLOCK_D // 8)
    zeros = tl.zeros((BLOCK_N, BLOCK_D // 8), tl.uint32)
    a, b, c, d = tl.philox(
        tl.load(seed),
        groups[None, :].to(tl.uint32) + zeros,
        rows[:, None].to(tl.uint32) + zeros,
        zeros,
        zeros,
        7,
    )
    words = tl.join(tl.join(a, b), tl.join(c, d))
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (BLOCK_N, BLOCK_D)).to(tl.int32) >= threshold


@triton.jit
def normalise_kernel(
    x,
    residual,
    weight,
    bias,
    seed,
    out,
    means,
    scales,
    N,
    D,
    eps,
    threshold,
    kept_scale,
    DROPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    at = rows[:, None].to(tl.int64) * D + columns[None, :]
    is_in = (rows[:, None] < N) & (columns[None, :] < D)
    z = tl.load(x + at, mask=is_in, other=0.0).to(tl.float32)
    if DROPS:
        is_kept = kept_elements(seed, rows, threshold, BLOCK_N, BLOCK_D)
        z = tl.where(is_kept, z * kept_scale, 0.0)
    z += tl.load(residual + at, mask=is_in, other=0.0).to(tl.float32)
    mean = tl.sum(z, 1) / D
    z = tl.where(is_in, z - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(z * z, 1) / D + eps)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    y = z * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_in)
    tl.store(means + rows, mean, mask=rows < N)
    tl.store(scales + rows, scale, mask=rows < N)


@triton.jit
def normalise_backward_kernel(
    grad,
    x,
    residual,
    weight,
    means,
    scales,
    seed,
    grad_x,
    grad_residual,
    grad_weights,
    grad_biases,
    N,
    D,
    tiles_each,
    threshold,
    kept_scale,
    DROPS: tl.constexpr,
    WRITES_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``grad_weights`` and ``grad_biases`` (P, D): each program's part."""
    columns = tl.arange(0, BLOCK_D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    grad_w = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_b = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start = tl.program_id(0) * tiles_each * BLOCK_N
    for first in range(start, tl.minimum(start + tiles_each * BLOCK_N, N), BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        at = rows[:, None].to(tl.int64) * D + columns[None, :]
        is_in = (rows[:, None] < N) & (columns[None, :] < D)
        g = tl.load(grad + at, mask=is_in, other=0.0).to(tl.float32)
        z = tl.load(x + at, mask=is_in, other=0.0).to(tl.float32)
        if DROPS:
            is_kept = kept_elements(seed, rows, threshold, BLOCK_N, BLOCK_D)
            z = tl.where(is_kept, z * kept_scale, 0.0)
        z += tl.load(residual + at, mask=is_in, other=0.0).to(tl.float32)
        mean = tl.load(means + rows, mask=rows < N, other=0.0)
        scale = tl.load(scales + rows, mask=rows < N, other=0.0)
        z = tl.where(is_in, (z - mean[:, None]) * scale[:, None], 0.0)
        grad_w += g * z
        grad_b += g
        g *= w[None, :]
        along_z = tl.sum(g * z, 1) / D
        along_1 = tl.sum(g, 1) / D
        g = (g - z * along_z[:, None] - along_1[:, None]) * scale[:, None]
        tl.store(grad_residual + at, g.to(grad_residual.dtype.element_ty), mask=is_in)
        if WRITES_X:
            if DROPS:
                g = tl.where(is_kept, g * kept_scale, 0.0)
            tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=is_in)
    at = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(grad_weights + at, tl.sum(grad_w, 0), mask=columns < D)
    tl.store(grad_biases + at, tl.sum(grad_b, 0), mask=columns < D)


def block_sizes(width: int) -> dict[str, int]:
    """Tile and threads: each loads 8 neighbouring numbers of a row, 16 bytes in half precision.

    With so many, Philox's bits come up in the thread that needs them.
    """
    block_d = max(16, triton.next_power_of_2(width))
    return {"BLOCK_N": ROWS, "BLOCK_D": block_d, "num_warps": max(1, block_d // 256)}


def dropping(p: float) -> dict[str, int | float | bool]:
    """Return the kernels' arguments for dropping with probability ``p``, in steps of 2 ** -16."""
    threshold = round(p * 2**16)
    kept_scale = 2**16 / (2**16 - threshold)
    return {"threshold": threshold, "kept_scale": kept_scale, "DROPS": threshold > 0}


def normalise(x, residual, weight, bias, p, eps, seed, dtype):
    """Compute the output in a type, and mean and reciprocal deviation of each row."""
    width = len(weight)
    num_rows = x.numel() // width
    out = torch.empty_like(x, dtype=dtype)
    means_N, scales_N = x.new_empty((2, num_rows), dtype=torch.float32)
    sizes = block_sizes(width)
    if num_rows:
        with torch.cuda.device_of(x):
            normalise_kernel[(triton.cdiv(num_rows, sizes["BLOCK_N"]),)](
                x,
                residual,
                weight.contiguous(),
                bias.contiguous(),
                seed,
                out,
                means_N,
                scales_N,
                num_rows,
                width,
                eps,
                **dropping(p),
                **sizes,
            )
    return out, means_N, scales_N


def normalise_backward(grad, x, residual, weight, means_N, scales_N, p, seed):
    """Gradients of ``x``, the residual, and in float32 of weight and bias."""
    width, num_rows = len(weight), len(means_N)
    sizes, drops = block_sizes(width), dropping(p)
    tiles = triton.cdiv(num_rows, sizes["BLOCK_N"])
    tiles_each = max(1, triton.cdiv(tiles, most_programs(x.device, sizes["num_warps"])))
    programs = triton.cdiv(tiles, tiles_each)
    grad_residual = torch.empty_like(residual)
    writes_x = drops["DROPS"] or x.dtype != residual.dtype
    grad_x = torch.empty_like(x) if writes_x else grad_residual
    parts_2PD = x.new_empty((2, programs, width), dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(x):
            normalise_backward_kernel[(programs,)](
                grad,
                x,
                residual,
                weight.contiguous(),
                means_N,
                scales_N,
                seed,
                grad_x,
                grad_residual,
                *parts_2PD,
                num_rows,
                width,
                tiles_each,
                WRITES_X=writes_x,
                **drops,
                **sizes,
            )
    return grad_x, grad_residual, *parts_2PD.sum(1)


def most_programs(device: torch.device, num_warps: int) -> int:
    """Of the backward pass; more would only write more parts."""
    if device.type == "cpu":  # the interpreter
        return 4
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * max(1, WARPS_PER_PROCESSOR // num_warps)
