"""Gradients of queries, keys and values; see
:mod:`metro.ops.kernels.relative_position_attention`.
"""

import triton
import triton.language as tl

from metro.ops.kernels.attention_tiles import (
    are_kept,
    finish_gradients,
    finish_scores,
    gradient_tile,
    keys_of_block,
    load_positions,
    load_random,
    load_range,
    load_rows,
    load_seen,
    store_rows,
)


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    out, grad_out, delta, T, H, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Each query's output times its gradient, summed over the width of the head."""
    num_blocks = tl.cdiv(T, BLOCK_T)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    row, head = row_head // H, row_head % H
    queries = tl.program_id(0) % num_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    start = (row * T * H + head) * K
    out_tile = load_rows(out + start, queries, H * K, T, K, BLOCK_K).to(tl.float32)
    grad_tile = load_rows(grad_out + start, queries, H * K, T, K, BLOCK_K).to(tl.float32)
    sums = tl.sum(out_tile * grad_tile, 1)
    tl.store(delta + row_head * T + queries, sums, mask=queries < T)


@triton.jit(do_not_specialize=["T", "S", "threshold"])
def key_gradient_kernel(
    q,
    k,
    v,
    bias,
    key_mask,
    key_range,
    positions,
    query_random,
    key_random,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
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
    """Of a block of keys and values. Tiles are keys by queries, which no product transposes."""
    num_blocks = tl.cdiv(S, BLOCK_S)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    row, head = row_head // H, row_head % H
    first_key = tl.program_id(0) % num_blocks * BLOCK_S
    keys = first_key + tl.arange(0, BLOCK_S)
    k_tile = load_rows(k + row * k_b + head * k_h, keys, k_s, S, K, BLOCK_K)
    v_tile = load_rows(v + row * v_b + head * v_h, keys, v_s, S, K, BLOCK_K)
    seen = load_seen(key_mask, row, keys, S)
    q += row * q_b + head * q_h
    if bias is not None:
        bias += head * (2 * S + 1)
    grad_out += (row * T * H + head) * K
    lse += row_head * T
    delta += row_head * T
    first_query, end_query = T * 0, T
    if IS_CAUSAL and positions is None:
        first_query = tl.maximum(first_key - (S - T), 0) // BLOCK_T * BLOCK_T
    first, end, blind = load_range(key_range, row, bias, S, IS_CAUSAL)
    if key_mask is not None:
        is_hidden = (first_key >= end) | (first_key + BLOCK_S <= first)
        end_query = tl.where(is_hidden, 0, T)
    if bias is not None and key_mask is not None:
        has_blind = blind > 0
        if positions is None:
            has_blind = blind > S - T
        first_query = tl.where(has_blind, 0, first_query)
        end_query = tl.where(has_blind, T, end_query)
    k_sums = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    v_sums = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    for start in range(first_query, end_query, BLOCK_T):
        queries = start + tl.arange(0, BLOCK_T)
        at = load_positions(positions, row, queries, T, S)
        q_tile = load_rows(q, queries, q_t, T, K, BLOCK_K)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
        scores = finish_scores(
            scores, bias, key_mask, at[None, :], keys[:, None], seen[:, None], blind, S, IS_CAUSAL
        )
        grad_tile = load_rows(grad_out, queries, H * K, T, K, BLOCK_K)
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
        lse_tile = tl.load(lse + queries, mask=queries < T, other=float("inf"))
        delta_tile = tl.load(delta + queries, mask=queries < T, other=0.0)
        kept = None
        if query_random is not None:
            of_queries = load_random(query_random, row_head, queries, T)
            of_keys = load_random(key_random, row_head, keys, S)
            kept = are_kept(of_queries[None, :], of_keys[:, None], threshold)
        weights, grad_scores = finish_gradients(
            scores, grad_weights, lse_tile[None, :], delta_tile[None, :], kept, kept_scale
        )
        v_sums = tl.dot(weights.to(q_tile.dtype), grad_tile, v_sums, input_precision="ieee")
        k_sums = tl.dot(grad_scores.to(q_tile.dtype), q_tile, k_sums, input_precision="ieee")
    k_sums = k_sums * (scale * 0.6931471805599453)  # out of units of log 2
    start = (row * S * H + head) * K
    store_rows(grad_k + start, k_sums, keys, H * K, S, K, BLOCK_K)
    store_rows(grad_v + start, v_sums, keys, H * K, S, K, BLOCK_K)


@triton.jit(do_not_specialize=["T", "S", "threshold"])
def query_gradient_kernel(
    q,
    k,
    v,
    bias,
    key_mask,
    key_range,
    positions,
    query_random,
    key_random,
    grad_out,
    lse,
    delta,
    grad_q,
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
    """Of a block of queries."""
    num_blocks = tl.cdiv(T, BLOCK_T)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    row, head = row_head // H, row_head % H
    queries = tl.program_id(0) % num_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    at = load_positions(positions, row, queries, T, S)
    grad_start = (row * T * H + head) * K
    q_tile = load_rows(q + row * q_b + head * q_h, queries, q_t, T, K, BLOCK_K)
    grad_tile = load_rows(grad_out + grad_start, queries, H * K, T, K, BLOCK_K)
    lse_tile = tl.load(lse + row_head * T + queries, mask=queries < T, other=float("inf"))
    delta_tile = tl.load(delta + row_head * T + queries, mask=queries < T, other=0.0)
    of_queries = None
    if query_random is not None:
        of_queries = load_random(query_random, row_head, queries, T)
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    if bias is not None:
        bias += head * (2 * S + 1)
    first, end, blind = keys_of_block(key_range, row, bias, at, S, BLOCK_S, IS_CAUSAL)
    sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(first, end, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k_tile = load_rows(k, keys, k_s, S, K, BLOCK_K)
        v_tile = load_rows(v, keys, v_s, S, K, BLOCK_K)
        grad_scores = gradient_tile(
            q_tile,
            grad_tile,
            k_tile,
            v_tile,
            bias,
            key_mask,
            key_random,
            row,
            row_head,
            at,
            keys,
            lse_tile,
            delta_tile,
            of_queries,
            blind,
            S,
            scale,
            threshold,
            kept_scale,
            IS_CAUSAL,
        )
        sums = tl.dot(grad_scores.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
    sums = sums * (scale * 0.6931471805599453)  # out of units of log 2
    store_rows(grad_q + grad_start, sums, queries, H * K, T, K, BLOCK_K)
