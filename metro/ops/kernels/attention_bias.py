"""The gradient of the bias; see :mod:`metro.ops.kernels.relative_position_attention`."""

import triton
import triton.language as tl

from metro.ops.kernels.attention_tiles import (
    gradient_tile,
    load_positions,
    load_random,
    load_range,
    load_rows,
)


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
    blind,
    T,
    S,
    q_t,
    grad_t,
    scale,
    threshold,
    kept_scale,
    K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the bias of a tile's pairs."""
    at = load_positions(positions, row, queries, T, S)
    q_tile = load_rows(q, queries, q_t, T, K, BLOCK_K)
    grad_tile = load_rows(grad_out, queries, grad_t, T, K, BLOCK_K)
    is_query = queries < T
    lse_tile = tl.load(lse + row_head * T + queries, mask=is_query, other=float("inf"))
    delta_tile = tl.load(delta + row_head * T + queries, mask=is_query, other=0.0)
    of_queries = None
    if query_random is not None:
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
        blind,
        S,
        scale,
        threshold,
        kept_scale,
        IS_CAUSAL,
    )
    if key_mask is not None:  # queries that see no key did not look at the bias
        grad_scores = tl.where((at >= blind)[:, None], grad_scores, 0.0)
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
    IS_CAUSAL: tl.constexpr,
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
    if positions is not None:
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
    bias += head * (2 * S + 1)
    of_tile = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for tile in range(first_tile, end_tile):
        row = (tile // tiles_of_row).to(tl.int64)
        first_row = (first_block + tile % tiles_of_row) * BLOCK
        keys = first_row + shift * BLOCK + of_tile
        k_tile = load_rows(k + row * k_b + head * k_h, keys, k_s, S, K, BLOCK_K)
        v_tile = load_rows(v + row * v_b + head * v_h, keys, v_s, S, K, BLOCK_K)
        _, _, blind = load_range(key_range, row, bias, S, IS_CAUSAL)
        if positions is not None:
            for start in range(0, T, BLOCK):
                queries = start + of_tile
                at = load_positions(positions, row, queries, T, S)
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
                        blind,
                        T,
                        S,
                        q_t,
                        H * K,
                        scale,
                        threshold,
                        kept_scale,
                        K,
                        IS_CAUSAL,
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
                blind,
                T,
                S,
                q_t,
                H * K,
                scale,
                threshold,
                kept_scale,
                K,
                IS_CAUSAL,
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
