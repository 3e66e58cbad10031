"""Triton kernels of :mod:`metro.ops.relative_position_attention`, after Dao et al. (2022, 2023).

``forward_kernel`` goes through the keys for a block of queries, and keeps of the weights the
logarithm of their sum. Going back the weights are computed again: by ``key_gradient_kernel`` for a
block of keys, by ``query_gradient_kernel`` for a block of queries, and where the bias is trained by
``bias_gradient_kernel``. Nothing is added atomically: the same inputs give the same bits.

- The bias is read by distance: a value per distance and head, which a tile takes from the cache.
  Its gradient sums diagonals. The tiles on one diagonal of tiles, in all rows of the batch, have
  their diagonals at the same distances, so they are added up first and summed along the diagonals
  once. This costs two more products a tile than in ``query_gradient_kernel``, where each tile
  would have to be rearranged in shared memory, or added atomically: 100 M additions to 12 k places
  at 32 rows of 512 tokens and 12 heads. Queries at given positions are sorted into such tiles by a
  product with ones and zeros.
- Dropout takes a number of PyTorch's generator (on GPUs Philox) for each query and each key of a
  head, and keeps a pair by the mixed bits of their sum (as MurmurHash3 ends): 8 instructions a
  weight, where seven rounds of Philox for each would take 70, more than all else here.

Floor: forward 4 B H T S K multiplications and additions, half of them where causal; backward 10, of
which these kernels do 14, and 4 more for the bias. Bytes: q, k, v, out and their gradients once. At
T = S = 512 in half precision that is 256 operations a byte forward and more backward: as many as a
GPU can feed. The exponential of each weight, 16 a cycle in a multiprocessor, takes as long as its
forward products at K = 64.

Sums are in float32; float32 inputs are not rounded to tf32.

PyTorch's FlexAttention is the rival. It has no dropout and adds to the bias's gradient atomically;
whether these kernels stay is decided by ``benchmarks/ops.py``, which measures both on a GPU.

Why more than 400 lines: the kernels share the functions of a tile, and most lines are arguments of
kernels, one each.

Shapes: B batch, H heads, T queries, S keys, K head width, N = 2 S - 1 distances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # nothing here is called then
    triton = None

TILES_PER_PROGRAM = 16
"""Tiles that a program of ``bias_gradient_kernel`` adds up."""
LOG2_E = 1.4426950408889634

if triton is not None:

    @triton.jit
    def load_rows(x, rows, stride, num_rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
        """Rows of a head, zeros beyond them."""
        d = tl.arange(0, BLOCK_K)
        at = rows.to(tl.int64)[:, None] * stride + d[None, :]
        return tl.load(x + at, mask=(rows[:, None] < num_rows) & (d[None, :] < K), other=0.0)

    @triton.jit
    def store_rows(x, tile, rows, stride, num_rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
        d = tl.arange(0, BLOCK_K)
        at = rows.to(tl.int64)[:, None] * stride + d[None, :]
        is_in = (rows[:, None] < num_rows) & (d[None, :] < K)
        tl.store(x + at, tile.to(x.dtype.element_ty), mask=is_in)

    @triton.jit
    def load_positions(positions, row, queries, T, S, HAS_POSITIONS: tl.constexpr):
        """Positions of the queries among the keys."""
        if HAS_POSITIONS:
            return tl.load(positions + row * T + queries, mask=queries < T, other=0).to(tl.int32)
        else:
            return queries + (S - T)

    @triton.jit
    def load_seen(key_mask, row, keys, S, HAS_MASK: tl.constexpr):
        """Whether a key may be seen at all."""
        if HAS_MASK:
            return tl.load(key_mask + row * S + keys, mask=keys < S, other=0) != 0
        else:
            return keys < S

    @triton.jit
    def load_random(random, at, index, count):
        """Dropout's number of each query or key."""
        numbers = tl.load(random + at.to(tl.int64) * count + index, mask=index < count, other=0)
        return numbers.to(tl.uint32, bitcast=True)

    @triton.jit
    def are_kept(of_queries, of_keys, threshold):
        """Whether pairs are kept; the arguments are broadcast."""
        x = of_queries + of_keys
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return x >= threshold.to(tl.uint32)

    @triton.jit
    def load_range(
        key_range, row, S, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr
    ):
        """First seen key, end of the seen keys, and the position below which queries see none.

        Such queries get the mean of all values where there is a bias, zeros where there is none.
        """
        first, end, blind_below = S * 0, S, S * 0
        if HAS_MASK:
            first = tl.load(key_range + 2 * row)
            end = tl.load(key_range + 2 * row + 1)
            if HAS_BIAS:
                blind_below = first
                if not IS_CAUSAL:
                    blind_below = tl.where(first < S, 0, S)
        return first, end, blind_below

    @triton.jit
    def keys_of_block(
        key_range,
        row,
        at,
        S,
        BLOCK_S: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
    ):
        """Where the keys of a block of queries start and end, and ``blind_below``."""
        first, end, blind_below = load_range(key_range, row, S, HAS_BIAS, HAS_MASK, IS_CAUSAL)
        if IS_CAUSAL:
            end = tl.minimum(end, tl.max(at, 0) + 1)
        if HAS_BIAS and HAS_MASK:
            has_blind = tl.min(at, 0) < blind_below
            first = tl.where(has_blind, 0, first)
            end = tl.where(has_blind, S, end)
        return first // BLOCK_S * BLOCK_S, end, blind_below

    @triton.jit
    def finish_scores(
        scores,
        bias,
        at,
        keys,
        is_seen,
        blind_below,
        S,
        HAS_BIAS: tl.constexpr,
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
    ):
        """Scores of a tile from its products, both in units of log 2; the arguments are broadcast.

        Queries beyond the last have the position 0 or one beyond the keys.
        """
        if HAS_BIAS:
            scores += tl.load(bias + (tl.minimum(keys, S - 1) - tl.minimum(at, S - 1) + (S - 1)))
        is_visible = is_seen
        if IS_CAUSAL:
            is_visible = is_seen & (keys <= at)
        scores = tl.where(is_visible, scores, -float("inf"))
        if HAS_BIAS and HAS_MASK:
            scores = tl.where((at < blind_below) & (keys < S), 0.0, scores)
        return scores

    @triton.jit
    def finish_gradients(
        scores,
        grad_weights,
        lse,
        delta,
        of_queries,
        of_keys,
        threshold,
        kept_scale,
        DROPS: tl.constexpr,
    ):
        """The weights as the values met them, and the gradient of the scores; broadcast."""
        weights = tl.exp2(scores - lse)
        kept_weights = weights
        if DROPS:
            kept = are_kept(of_queries, of_keys, threshold)
            kept_weights = tl.where(kept, weights * kept_scale, 0.0)
            grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
        return kept_weights, weights * (grad_weights - delta)

    @triton.jit
    def gradient_tile(
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
        lse,
        delta,
        of_queries,
        blind_below,
        S,
        scale,
        threshold,
        kept_scale,
        HAS_BIAS: tl.constexpr,
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
        DROPS: tl.constexpr,
    ):
        """Gradient of the scores of a tile of queries by keys."""
        is_seen = load_seen(key_mask, row, keys, S, HAS_MASK)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = finish_scores(
            scores,
            bias,
            at[:, None],
            keys[None, :],
            is_seen[None, :],
            blind_below,
            S,
            HAS_BIAS,
            HAS_MASK,
            IS_CAUSAL,
        )
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        of_keys = of_queries
        if DROPS:
            of_keys = load_random(key_random, row_head, keys, S)
        _, grad_scores = finish_gradients(
            scores,
            grad_weights,
            lse[:, None],
            delta[:, None],
            of_queries[:, None],
            of_keys[None, :],
            threshold,
            kept_scale,
            DROPS,
        )
        return grad_scores

    @triton.jit
    def key_range_kernel(key_mask, key_range, S, BLOCK: tl.constexpr):
        """First visible key and end of the visible keys, S and 0 where there are none."""
        row = tl.program_id(0).to(tl.int64)
        first = tl.zeros((BLOCK,), tl.int32) + S
        end = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, S, BLOCK):
            keys = start + tl.arange(0, BLOCK)
            is_seen = load_seen(key_mask, row, keys, S, True)
            first = tl.minimum(first, tl.where(is_seen, keys, S))
            end = tl.maximum(end, tl.where(is_seen, keys + 1, 0))
        tl.store(key_range + 2 * row, tl.min(first, 0))
        tl.store(key_range + 2 * row + 1, tl.max(end, 0))

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
        HAS_BIAS: tl.constexpr,
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        DROPS: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """``out`` of a block of queries, and ``lse``, log 2 of the sum of their exponentials."""
        num_blocks = tl.cdiv(T, BLOCK_T)
        row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
        row, head = row_head // H, row_head % H
        queries = tl.program_id(0) % num_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        at = load_positions(positions, row, queries, T, S, HAS_POSITIONS)
        q_tile = load_rows(q + row * q_b + head * q_h, queries, q_t, T, K, BLOCK_K)
        if DROPS:
            of_queries = load_random(query_random, row_head, queries, T)
        k += row * k_b + head * k_h
        v += row * v_b + head * v_h
        if HAS_BIAS:
            bias += head * (2 * S - 1)
        first, end, blind_below = keys_of_block(
            key_range, row, at, S, BLOCK_S, HAS_BIAS, HAS_MASK, IS_CAUSAL
        )
        highest = tl.full((BLOCK_T,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for start in range(first, end, BLOCK_S):
            keys = start + tl.arange(0, BLOCK_S)
            k_tile = load_rows(k, keys, k_s, S, K, BLOCK_K)
            is_seen = load_seen(key_mask, row, keys, S, HAS_MASK)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            scores = finish_scores(
                scores,
                bias,
                at[:, None],
                keys[None, :],
                is_seen[None, :],
                blind_below,
                S,
                HAS_BIAS,
                HAS_MASK,
                IS_CAUSAL,
            )
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            # Queries that have seen nothing yet: their weights stay zero.
            unit = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            weights = tl.exp2(scores - unit[:, None])
            rescale = tl.exp2(highest - unit)
            total = total * rescale + tl.sum(weights, 1)
            if DROPS:
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
        HAS_BIAS: tl.constexpr,
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        DROPS: tl.constexpr,
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
        is_seen = load_seen(key_mask, row, keys, S, HAS_MASK)
        q += row * q_b + head * q_h
        if HAS_BIAS:
            bias += head * (2 * S - 1)
        grad_out += (row * T * H + head) * K
        lse += row_head * T
        delta += row_head * T
        first_query, end_query = T * 0, T
        if IS_CAUSAL and not HAS_POSITIONS:
            first_query = tl.maximum(first_key - (S - T), 0) // BLOCK_T * BLOCK_T
        first, end, blind_below = load_range(key_range, row, S, HAS_BIAS, HAS_MASK, IS_CAUSAL)
        if HAS_MASK:
            is_hidden = (first_key >= end) | (first_key + BLOCK_S <= first)
            end_query = tl.where(is_hidden, 0, T)
        if HAS_BIAS and HAS_MASK:
            has_blind = blind_below > 0
            if not HAS_POSITIONS:
                has_blind = blind_below > S - T
            first_query = tl.where(has_blind, 0, first_query)
            end_query = tl.where(has_blind, T, end_query)
        k_sums = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
        v_sums = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
        for start in range(first_query, end_query, BLOCK_T):
            queries = start + tl.arange(0, BLOCK_T)
            at = load_positions(positions, row, queries, T, S, HAS_POSITIONS)
            q_tile = load_rows(q, queries, q_t, T, K, BLOCK_K)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
            scores = finish_scores(
                scores,
                bias,
                at[None, :],
                keys[:, None],
                is_seen[:, None],
                blind_below,
                S,
                HAS_BIAS,
                HAS_MASK,
                IS_CAUSAL,
            )
            grad_tile = load_rows(grad_out, queries, H * K, T, K, BLOCK_K)
            grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
            lse_tile = tl.load(lse + queries, mask=queries < T, other=float("inf"))
            delta_tile = tl.load(delta + queries, mask=queries < T, other=0.0)
            of_queries, of_keys = queries, keys
            if DROPS:
                of_queries = load_random(query_random, row_head, queries, T)
                of_keys = load_random(key_random, row_head, keys, S)
            weights, grad_scores = finish_gradients(
                scores,
                grad_weights,
                lse_tile[None, :],
                delta_tile[None, :],
                of_queries[None, :],
                of_keys[:, None],
                threshold,
                kept_scale,
                DROPS,
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
        HAS_BIAS: tl.constexpr,
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        DROPS: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Of a block of queries."""
        num_blocks = tl.cdiv(T, BLOCK_T)
        row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
        row, head = row_head // H, row_head % H
        queries = tl.program_id(0) % num_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        at = load_positions(positions, row, queries, T, S, HAS_POSITIONS)
        grad_start = (row * T * H + head) * K
        q_tile = load_rows(q + row * q_b + head * q_h, queries, q_t, T, K, BLOCK_K)
        grad_tile = load_rows(grad_out + grad_start, queries, H * K, T, K, BLOCK_K)
        lse_tile = tl.load(lse + row_head * T + queries, mask=queries < T, other=float("inf"))
        delta_tile = tl.load(delta + row_head * T + queries, mask=queries < T, other=0.0)
        of_queries = queries
        if DROPS:
            of_queries = load_random(query_random, row_head, queries, T)
        k += row * k_b + head * k_h
        v += row * v_b + head * v_h
        if HAS_BIAS:
            bias += head * (2 * S - 1)
        first, end, blind_below = keys_of_block(
            key_range, row, at, S, BLOCK_S, HAS_BIAS, HAS_MASK, IS_CAUSAL
        )
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
                blind_below,
                S,
                scale,
                threshold,
                kept_scale,
                HAS_BIAS,
                HAS_MASK,
                IS_CAUSAL,
                DROPS,
            )
            sums = tl.dot(grad_scores.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
        sums = sums * (scale * 0.6931471805599453)  # out of units of log 2
        store_rows(grad_q + grad_start, sums, queries, H * K, T, K, BLOCK_K)

    @triton.jit
    def bias_tile(
        q,
        grad_out,
        k_tile,
        v_tile,
        bias,
        key_mask,
        positions,
        query_random,
        key_random,
        lse,
        delta,
        row,
        row_head,
        queries,
        keys,
        blind_below,
        T,
        S,
        q_t,
        grad_t,
        scale,
        threshold,
        kept_scale,
        K: tl.constexpr,
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        DROPS: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Gradient of the bias of a tile's pairs."""
        at = load_positions(positions, row, queries, T, S, HAS_POSITIONS)
        q_tile = load_rows(q, queries, q_t, T, K, BLOCK_K)
        grad_tile = load_rows(grad_out, queries, grad_t, T, K, BLOCK_K)
        is_query = queries < T
        lse_tile = tl.load(lse + row_head * T + queries, mask=is_query, other=float("inf"))
        delta_tile = tl.load(delta + row_head * T + queries, mask=is_query, other=0.0)
        of_queries = queries
        if DROPS:
            of_queries = load_random(query_random, row_head, queries, T)
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
            blind_below,
            S,
            scale,
            threshold,
            kept_scale,
            True,
            HAS_MASK,
            IS_CAUSAL,
            DROPS,
        )
        if HAS_MASK:  # queries that see no key did not look at the bias
            grad_scores = tl.where((at >= blind_below)[:, None], grad_scores, 0.0)
        return grad_scores

    @triton.jit(do_not_specialize=["B", "num_splits", "T", "S", "threshold"])
    def bias_gradient_kernel(
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
        partials,
        B,
        num_splits,
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
        HAS_MASK: tl.constexpr,
        IS_CAUSAL: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        DROPS: tl.constexpr,
        TILES: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """``partials`` (splits, H, diagonals, 2, BLOCK): a program's sums over TILES tiles.

        On a diagonal of tiles are those whose keys begin ``shift`` blocks after their queries (or
        positions, where they are given). Key minus query within a tile goes from ``-BLOCK`` to
        ``BLOCK - 1``: the first entry has the sums where it is negative, the second the others.
        """
        num_rows = T
        if HAS_POSITIONS:
            num_rows = S
        num_row_blocks, num_key_blocks = tl.cdiv(num_rows, BLOCK), tl.cdiv(S, BLOCK)
        num_diagonals = num_row_blocks + num_key_blocks - 1
        split, rest = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
        diagonal, head = rest % num_diagonals, (rest // num_diagonals).to(tl.int64)
        shift = diagonal - (num_row_blocks - 1)
        first_block = tl.maximum(-shift, 0)
        tiles_of_row = tl.minimum(num_row_blocks, num_key_blocks - shift) - first_block
        first_tile = split * TILES
        end_tile = tl.minimum(first_tile + TILES, tiles_of_row * B)
        if IS_CAUSAL:  # tiles of which no key is visible
            is_hidden = shift * BLOCK > (S - num_rows) + BLOCK - 1
            end_tile = tl.where(is_hidden, first_tile, end_tile)
        bias += head * (2 * S - 1)
        of_tile = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK, BLOCK), tl.float32)
        for tile in range(first_tile, end_tile):
            row = (tile // tiles_of_row).to(tl.int64)
            first_row = (first_block + tile % tiles_of_row) * BLOCK
            keys = first_row + shift * BLOCK + of_tile
            k_tile = load_rows(k + row * k_b + head * k_h, keys, k_s, S, K, BLOCK_K)
            v_tile = load_rows(v + row * v_b + head * v_h, keys, v_s, S, K, BLOCK_K)
            _, _, blind_below = load_range(key_range, row, S, True, HAS_MASK, IS_CAUSAL)
            if HAS_POSITIONS:
                for start in range(0, T, BLOCK):
                    queries = start + of_tile
                    at = load_positions(positions, row, queries, T, S, True)
                    is_here = (queries < T) & (at >= first_row) & (at < first_row + BLOCK)
                    if tl.max(is_here.to(tl.int32), 0) > 0:
                        grad_scores = bias_tile(
                            q + row * q_b + head * q_h,
                            grad_out + (row * T * H + head) * K,
                            k_tile,
                            v_tile,
                            bias,
                            key_mask,
                            positions,
                            query_random,
                            key_random,
                            lse,
                            delta,
                            row,
                            row * H + head,
                            queries,
                            keys,
                            blind_below,
                            T,
                            S,
                            q_t,
                            H * K,
                            scale,
                            threshold,
                            kept_scale,
                            K,
                            HAS_MASK,
                            IS_CAUSAL,
                            True,
                            DROPS,
                            BLOCK_K,
                        )
                        is_its = (first_row + of_tile)[:, None] == at[None, :]
                        sorts = (is_its & is_here[None, :]).to(k_tile.dtype)
                        grad_scores = grad_scores.to(k_tile.dtype)
                        sums = tl.dot(sorts, grad_scores, sums, input_precision="ieee")
            else:
                sums += bias_tile(
                    q + row * q_b + head * q_h,
                    grad_out + (row * T * H + head) * K,
                    k_tile,
                    v_tile,
                    bias,
                    key_mask,
                    positions,
                    query_random,
                    key_random,
                    lse,
                    delta,
                    row,
                    row * H + head,
                    first_row + of_tile,
                    keys,
                    blind_below,
                    T,
                    S,
                    q_t,
                    H * K,
                    scale,
                    threshold,
                    kept_scale,
                    K,
                    HAS_MASK,
                    IS_CAUSAL,
                    False,
                    DROPS,
                    BLOCK_K,
                )
        # Row i begins at key i: a column c has the pairs of key minus query c, and c - BLOCK.
        column = of_tile[:, None] + of_tile[None, :]
        turned = tl.gather(sums, column % BLOCK, 1)
        at = ((split.to(tl.int64) * H + head) * num_diagonals + diagonal) * (2 * BLOCK)
        before = tl.sum(tl.where(column < BLOCK, 0.0, turned), 0)
        tl.store(partials + at + of_tile, before)
        after = tl.sum(tl.where(column < BLOCK, turned, 0.0), 0)
        tl.store(partials + at + BLOCK + of_tile, after)


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
    """What the kernels read, besides gradients; ``None`` where there is none."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    """H,N float32, in units of log 2."""
    key_mask: torch.Tensor | None
    key_range: torch.Tensor | None
    positions: torch.Tensor | None
    query_random: torch.Tensor | None
    key_random: torch.Tensor | None

    def options(self, is_causal: bool, dropout: float) -> dict:
        """Sizes, strides, numbers and what there is, as every kernel of a tile takes them."""
        numbers = {"T": self.q.shape[2], "S": self.k.shape[2], "H": self.q.shape[1]}
        for name, x, row in (("q", self.q, "t"), ("k", self.k, "s"), ("v", self.v, "s")):
            of_axes = zip(("b", "h", row), x.stride(), strict=False)
            numbers |= {f"{name}_{axis}": stride for axis, stride in of_axes}
        return numbers | {
            "scale": self.q.shape[-1] ** -0.5 * LOG2_E,
            "threshold": min(round(dropout * 2**32), 2**32 - 1),
            "kept_scale": 1.0 / (1.0 - dropout),
            "K": self.q.shape[-1],
            "HAS_BIAS": self.bias is not None,
            "HAS_MASK": self.key_mask is not None,
            "IS_CAUSAL": is_causal,
            "HAS_POSITIONS": self.positions is not None,
            "DROPS": self.query_random is not None,
        }


def prepare(q, k, v, bias, key_mask, positions, random) -> Inputs:
    """As the kernels read them."""
    (batch_size, num_heads, num_queries, _), num_keys = q.shape, k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if bias is not None:
        scaled = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        bias = torch.mul(bias.float(), LOG2_E, out=scaled)
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
            del options["HAS_BIAS"]
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
