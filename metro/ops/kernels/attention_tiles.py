"""Functions of a tile of queries by keys, which the kernels of attention share.

See :mod:`metro.ops.kernels.relative_position_attention`.
"""

import triton
import triton.language as tl


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
def load_positions(positions, row, queries, T, S):
    """Positions of the queries among the keys."""
    if positions is not None:
        return tl.load(positions + row * T + queries, mask=queries < T, other=0).to(tl.int32)
    else:
        return queries + (S - T)


@triton.jit
def load_seen(key_mask, row, keys, S):
    """Load which keys may be seen at all."""
    if key_mask is not None:
        return tl.load(key_mask + row * S + keys, mask=keys < S, other=0) != 0
    else:
        return keys < S


@triton.jit
def load_random(random, at, index, count):
    """Load dropout's number of each query or key."""
    numbers = tl.load(random + at.to(tl.int64) * count + index, mask=index < count, other=0)
    return numbers.to(tl.uint32, bitcast=True)


@triton.jit
def are_kept(of_queries, of_keys, threshold):
    """Decide which pairs are kept; the arguments are broadcast."""
    x = of_queries + of_keys
    return (x ^ (x >> 16)) * 0x85EBCA6B >= threshold.to(tl.uint32)


@triton.jit
def load_range(key_range, row, bias, S, IS_CAUSAL: tl.constexpr):
    """First seen key, end of the seen keys, and the position below which queries see none.

    Such queries get the mean of all values where there is a bias, zeros where there is none.
    """
    first, end, blind = S * 0, S, S * 0
    if key_range is not None:
        first = tl.load(key_range + 2 * row)
        end = tl.load(key_range + 2 * row + 1)
        if bias is not None:
            blind = first
            if not IS_CAUSAL:
                blind = tl.where(first < S, 0, S)
    return first, end, blind


@triton.jit
def keys_of_block(key_range, row, bias, at, S, BLOCK_S: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Return start and end of the keys of a block of queries, and ``blind``."""
    first, end, blind = load_range(key_range, row, bias, S, IS_CAUSAL)
    if IS_CAUSAL:
        end = tl.minimum(end, tl.max(at, 0) + 1)
    if bias is not None and key_range is not None:
        has_blind = tl.min(at, 0) < blind
        first = tl.where(has_blind, 0, first)
        end = tl.where(has_blind, S, end)
    return first // BLOCK_S * BLOCK_S, end, blind


@triton.jit
def finish_scores(scores, bias, key_mask, at, keys, seen, blind, S, IS_CAUSAL: tl.constexpr):
    """Scores of a tile from its products, both in units of log 2; the arguments are broadcast.

    Queries beyond the last have the position 0 or one beyond the keys.

    The bias is loaded in a branch: elsewhere in the kernels' loops the compiler would copy it to
    shared memory ahead of time, element by element.
    """
    if bias is not None:
        last = S - 1
        lowest = tl.minimum(tl.min(keys), last) - tl.minimum(tl.max(at), last) + last
        highest = tl.minimum(tl.max(keys), last) - tl.minimum(tl.min(at), last) + last
        is_before = highest < tl.load(bias + 2 * S - 1)
        if is_before | (lowest >= tl.load(bias + 2 * S)):  # far away it is one number
            scores += tl.load(bias + tl.where(is_before, 0, 2 * last))
        else:
            scores += tl.load(bias + (tl.minimum(keys, last) - tl.minimum(at, last) + last))
    is_visible = seen
    if IS_CAUSAL:
        is_visible = seen & (keys <= at)
    scores = tl.where(is_visible, scores, -float("inf"))
    if bias is not None and key_mask is not None:
        scores = tl.where((at < blind) & (keys < S), 0.0, scores)
    return scores


@triton.jit
def finish_gradients(scores, grad_weights, lse, delta, kept, kept_scale):
    """The weights as the values met them, and the gradient of the scores; broadcast."""
    weights = tl.exp2(scores - lse)
    kept_weights = weights
    if kept is not None:
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
    blind,
    S,
    scale,
    threshold,
    kept_scale,
    IS_CAUSAL: tl.constexpr,
):
    """Gradient of the scores of a tile of queries by keys."""
    seen = load_seen(key_mask, row, keys, S)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    scores = finish_scores(
        scores, bias, key_mask, at[:, None], keys[None, :], seen[None, :], blind, S, IS_CAUSAL
    )
    grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
    kept = None
    if key_random is not None:
        of_keys = load_random(key_random, row_head, keys, S)
        kept = are_kept(of_queries[:, None], of_keys[None, :], threshold)
    _, grad_scores = finish_gradients(
        scores, grad_weights, lse[:, None], delta[:, None], kept, kept_scale
    )
    return grad_scores
