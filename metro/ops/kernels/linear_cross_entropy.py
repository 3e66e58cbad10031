"""Triton kernels of :mod:`metro.ops.linear_cross_entropy`: logits live in registers.

``reduce_rows`` gives a program a block of rows and a part of the vocabulary, and keeps of its
logits the maximum, the sum of exponentials, the target's logit and, if asked for, a Gumbel-max
sample (the token with the highest ``logit - log(-log(u))``, u uniform, is a draw from the softmax).
PyTorch joins the parts. ``logits_gradient`` projects once more and writes the gradient of a chunk's
logits, in the inputs' type, which cuBLAS multiplies with hidden states and weight.

Products accumulate in float32 (float32 inputs are not rounded to tf32), and so does what follows.

Lower bound: 2 N V D FLOPs each; reduce writes 20 bytes for 2,048 logits, gradient 2 bytes for one
in half precision.

Shapes: N rows, D width, V vocabulary, P parts of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from metro.ops.linear_cross_entropy_rows import Coefficients, RowSums

BLOCKS_PER_PART = 32
"""Tiles of the vocabulary that a program of ``reduce_kernel`` goes through."""


@triton.jit
def project_tile(hidden, weight, bias, rows, tokens, N, V, D, BLOCK_D: tl.constexpr):
    """Logits of a tile in float32, -inf beyond the vocabulary."""
    logits = tl.zeros((rows.shape[0], tokens.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        hidden_at = rows[:, None].to(tl.int64) * D + d[None, :]
        weight_at = tokens[None, :].to(tl.int64) * D + d[:, None]
        h = tl.load(hidden + hidden_at, mask=(rows[:, None] < N) & (d[None, :] < D), other=0.0)
        w = tl.load(weight + weight_at, mask=(tokens[None, :] < V) & (d[:, None] < D), other=0.0)
        logits = tl.dot(h, w, logits, input_precision="ieee")
    if bias is not None:
        logits += tl.load(bias + tokens, mask=tokens < V, other=0.0).to(tl.float32)[None, :]
    return tl.where(tokens[None, :] < V, logits, -float("inf"))


@triton.jit
def gumbel(tokens, streams):
    """``-log(-log(1 - u))``, u of 32 bits of Philox of (word, stream): fine where u is small.

    An exponential variable below 2 ** -6 by its series, whose next term is below a rounding.
    """
    zeros = (tokens[None, :] + tl.zeros_like(streams)[:, None].to(tl.int32)).to(tl.uint32) * 0
    low = (streams & 0xFFFFFFFF).to(tl.uint32)[:, None] + zeros
    high = ((streams >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None] + zeros
    bits, _, _, _ = tl.philox(0, tokens[None, :].to(tl.uint32) + zeros, low, high, zeros, 7)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064e-10
    u = tl.minimum(u, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def reduce_kernel(
    hidden,
    weight,
    bias,
    targets,
    streams,
    sums,
    ids,
    N,
    V,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS_PER_PART: tl.constexpr,
):
    """``sums`` (5, P, N): maximum, others' exponentials, target logit, sum, highest noisy one.

    ``ids`` (2, P, N): where the maximum and the highest noisy logit are.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    is_row = rows < N
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    if streams is not None:
        stream = tl.load(streams + rows, mask=is_row, other=0)
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    noisiest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    others = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    most_probable = tl.zeros((BLOCK_N,), tl.int32)
    sample = tl.zeros((BLOCK_N,), tl.int32)
    start = part * BLOCKS_PER_PART * BLOCK_V
    for first in range(start, tl.minimum(start + BLOCKS_PER_PART * BLOCK_V, V), BLOCK_V):
        tokens = first + tl.arange(0, BLOCK_V)
        logits = project_tile(hidden, weight, bias, rows, tokens, N, V, D, BLOCK_D)
        is_target = tokens[None, :] == target[:, None]
        tile_highest = tl.max(logits, 1)
        is_higher = tile_highest > highest
        most_probable = tl.where(is_higher, tl.argmax(logits, 1) + first, most_probable)
        new_highest = tl.maximum(highest, tile_highest)
        exponentials = tl.exp(logits - new_highest[:, None])
        others = others * tl.exp(highest - new_highest)
        others += tl.sum(tl.where(is_target, 0.0, exponentials), 1)
        highest = new_highest
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), 1)
        total += tl.sum(tl.where(tokens[None, :] < V, logits, 0.0), 1)
        if streams is not None:
            noisy = logits + gumbel(tokens, stream)
            tile_noisiest = tl.max(noisy, 1)
            is_noisier = tile_noisiest > noisiest
            sample = tl.where(is_noisier, tl.argmax(noisy, 1) + first, sample)
            noisiest = tl.maximum(noisiest, tile_noisiest)
    at, size = part.to(tl.int64) * N + rows, num_parts.to(tl.int64) * N
    tl.store(sums + at, highest, mask=is_row)
    tl.store(sums + size + at, others, mask=is_row)
    tl.store(sums + 2 * size + at, target_logit, mask=is_row)
    tl.store(sums + 3 * size + at, total, mask=is_row)
    tl.store(ids + at, most_probable, mask=is_row)
    if streams is not None:
        tl.store(sums + 4 * size + at, noisiest, mask=is_row)
        tl.store(ids + size + at, sample, mask=is_row)


@triton.jit
def gradient_kernel(
    hidden,
    weight,
    bias,
    targets,
    coefficients,
    grad,
    N,
    V,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``grad`` (N, V): ``scale * p + shift``, and ``at_target`` at the target, of each row."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row = rows < N
    logits = project_tile(hidden, weight, bias, rows, tokens, N, V, D, BLOCK_D)
    scale = tl.load(coefficients + rows, mask=is_row, other=0.0)
    shift = tl.load(coefficients + N + rows, mask=is_row, other=0.0)
    at_target = tl.load(coefficients + 2 * N + rows, mask=is_row, other=0.0)
    normaliser = tl.load(coefficients + 3 * N + rows, mask=is_row, other=0.0)
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    tile = tl.exp(logits - normaliser[:, None]) * scale[:, None] + shift[:, None]
    tile = tl.where(tokens[None, :] == target[:, None], at_target[:, None], tile)
    at = rows[:, None].to(tl.int64) * V + tokens[None, :]
    is_in = is_row[:, None] & (tokens[None, :] < V)
    tl.store(grad + at, tile.to(grad.dtype.element_ty), mask=is_in)


def block_sizes(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles for Ampere and later; three stages of them fit in 100 KiB of shared memory.

    ``reduce`` needs the registers of half a tile for its noise and its sums.
    """
    block_d = min(128 // dtype.itemsize, max(16, triton.next_power_of_2(width)))
    block_n = 128 if dtype.itemsize == 2 else 64
    return {"BLOCK_N": block_n, "BLOCK_V": 64 if kernel == "reduce" else 128, "BLOCK_D": block_d}


def reduce_rows(hidden_ND, weight_VD, bias_V, targets_N, streams_N, needs_sum):
    """As :func:`metro.ops.linear_cross_entropy.reduce_in_chunks`; no logits are kept."""
    (num_rows, width), vocab_size = hidden_ND.shape, len(weight_VD)
    sizes = block_sizes("reduce", width, hidden_ND.dtype)
    num_parts = triton.cdiv(vocab_size, sizes["BLOCK_V"] * BLOCKS_PER_PART)
    sums = hidden_ND.new_empty((5, num_parts, num_rows), dtype=torch.float32)
    ids = torch.empty((2, num_parts, num_rows), dtype=torch.int32, device=hidden_ND.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, sizes["BLOCK_N"]), num_parts)
        with torch.cuda.device_of(hidden_ND):
            reduce_kernel[grid](
                hidden_ND.contiguous(),
                weight_VD.contiguous(),
                bias_V,
                targets_N,
                streams_N,
                sums,
                ids,
                num_rows,
                vocab_size,
                width,
                BLOCKS_PER_PART=BLOCKS_PER_PART,
                num_warps=8,
                num_stages=3,
                **sizes,
            )
    highest_PN, others_PN, target_PN, total_PN, noisiest_PN = sums
    highest_N, part_N = highest_PN.max(0)
    target_N = target_PN.sum(0)
    # In units of the highest logit, where nothing overflows.
    others_N = (others_PN * (highest_PN - highest_N).exp()).sum(0)
    all_N = others_N + (target_N - highest_N).exp()
    rows = RowSums(
        target_N,
        highest_N + all_N.log(),
        others_N / all_N,
        total_PN.sum(0) if needs_sum else None,
        ids[0].gather(0, part_N.unsqueeze(0)).squeeze(0).long(),
    )
    if streams_N is None:
        return rows, None, None
    samples_N = ids[1].gather(0, noisiest_PN.argmax(0, keepdim=True)).squeeze(0).long()
    return rows, samples_N, None


def logits_gradient_of_rows(
    hidden_CD, weight_VD, bias_V, targets_C, row: Coefficients
) -> torch.Tensor:
    """Gradient of the logits of a chunk, in the inputs' type."""
    (num_rows, width), vocab_size = hidden_CD.shape, len(weight_VD)
    sizes = block_sizes("gradient", width, hidden_CD.dtype)
    grad_CV = hidden_CD.new_empty(num_rows, vocab_size)
    if num_rows:
        grid = (triton.cdiv(num_rows, sizes["BLOCK_N"]), triton.cdiv(vocab_size, sizes["BLOCK_V"]))
        with torch.cuda.device_of(hidden_CD):
            gradient_kernel[grid](
                hidden_CD.contiguous(),
                weight_VD.contiguous(),
                bias_V,
                targets_C,
                torch.stack(row),
                grad_CV,
                num_rows,
                vocab_size,
                width,
                num_warps=8,
                num_stages=3,
                **sizes,
            )
    return grad_CV
