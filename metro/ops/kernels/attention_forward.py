"""The forward kernels of :mod:`metro.ops.kernels.relative_position_attention`."""

import triton
import triton.language as tl

from metro.ops.kernels.attention_tiles import (
    are_kept,
    finish_scores,
    keys_of_block,
    load_positions,
    load_random,
    load_rows,
    load_seen,
    store_rows,
)


@triton.jit
def key_range_kernel(key_mask, key_range, S, BLOCK: tl.constexpr):
    """First visible key and end of the visible keys, S and 0 where there are none."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.zeros((BLOCK,), tl.int32) + S
    end = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, S, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = load_seen(key_mask, row, keys, S)
        first = tl.minimum(first, tl.where(seen, keys, S))
        end = tl.maximum(end, tl.where(seen, keys + 1, 0))
    tl.store(key_range + 2 * row, tl.min(first, 0))
    tl.store(key_range + 2 * row + 1, tl.max(end, 0))


@triton.jit
def bias_kernel(bias, scaled, N, bias_h, bias_n, unit, BLOCK: tl.constexpr):
    """``scaled`` (H, N + 2): the bias in a unit; how many values at the beginning are the first
    one, as of distances beyond the last bucket; and where those begin that are the last one."""
    head = tl.program_id(0).to(tl.int64)
    bias += head * bias_h
    scaled += head * (N + 2)
    first, last = tl.load(bias), tl.load(bias + (N - 1) * bias_n)
    first_near = tl.zeros((BLOCK,), tl.int32) + N
    end_near = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(bias + at * bias_n, mask=at < N, other=0.0)
        tl.store(scaled + at, value.to(tl.float32) * unit, mask=at < N)
        first_near = tl.minimum(first_near, tl.where((at < N) & (value != first), at, N))
        end_near = tl.maximum(end_near, tl.where((at < N) & (value != last), at + 1, 0))
    tl.store(scaled + N, tl.min(first_near, 0).to(tl.float32))
    tl.store(scaled + N + 1, tl.max(end_near, 0).to(tl.float32))


@triton.jit(do_not_specialize=["T", "S", "threshold"])
def forward_kernel(
    q,
    k,
    v,
    bias,
    key_mask,
    key_range,
    positions,
    query_random,
    key_random,
    out,
    lse,
    T,
    S,
    H,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    scale,
    threshold,
    kept_scale,
    K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out`` of a block of queries, and ``lse``, log 2 of the sum of their exponentials."""
    num_blocks = tl.cdiv(T, BLOCK_T)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    row, head = row_head // H, row_head % H
    queries = tl.program_id(0) % num_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    at = load_positions(positions, row, queries, T, S)
    q_tile = load_rows(q + row * q_b + head * q_h, queries, q_t, T, K, BLOCK_K)
    if query_random is not None:
        of_queries = load_random(query_random, row_head, queries, T)
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    if bias is not None:
        bias += head * (2 * S + 1)
    first, end, blind = keys_of_block(key_range, row, bias, at, S, BLOCK_S, IS_CAUSAL)
    highest = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(first, end, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k_tile = load_rows(k, keys, k_s, S, K, BLOCK_K)
        seen = load_seen(key_mask, row, keys, S)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = finish_scores(
            scores, bias, key_mask, at[:, None], keys[None, :], seen[None, :], blind, S, IS_CAUSAL
        )
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # Queries that have seen nothing yet: their weights stay zero.
        unit = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        weights = tl.exp2(scores - unit[:, None])
        rescale = tl.exp2(highest - unit)
        total = total * rescale + tl.sum(weights, 1)
        if query_random is not None:
            of_keys = load_random(key_random, row_head, keys, S)
            kept = are_kept(of_queries[:, None], of_keys[None, :], threshold)
            weights = tl.where(kept, weights, 0.0)
        v_tile = load_rows(v, keys, v_s, S, K, BLOCK_K)
        sums = sums * rescale[:, None]
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums, input_precision="ieee")
        highest = new_highest
    is_blank = total == 0.0
    total = tl.where(is_blank, 1.0, total)
    sums = sums * (kept_scale / total)[:, None]
    store_rows(out + (row * T * H + head) * K, sums, queries, H * K, T, K, BLOCK_K)
    # Infinite where no key is visible: there the weights are zero going back too.
    lse_tile = tl.where(is_blank, float("inf"), highest + tl.log2(total))
    tl.store(lse + row_head * T + queries, lse_tile, mask=queries < T)
