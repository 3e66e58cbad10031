"""Attention with a relative position bias, without B,H,T,S tensors kept for the backward pass.

On the CPU one row and a few heads are computed at a time, so that the scores stay in the cache, and
the backward pass computes them again (Dao et al., 2022, applied to CPU caches). Besides the inputs
only a byte per weight is kept, and that only with dropout. One more q k^T is 1/7 of the arithmetic
of attention, which is itself about a tenth of a layer's at 512 tokens.

Shapes: B batch, H heads, T queries, S keys, K head width, N = 2 S - 1 distances.
"""

import math

import torch
import torch.nn.functional as F

HEADS_AT_A_TIME = 4
"""Chosen so that the scores of 512 x 512 tokens (1 MiB a head) stay in the cores' caches."""


def relative_position_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    query_positions: torch.Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """``dropout(softmax(q k^T / sqrt(K) + bias[key - query]) masked to the visible keys) v``.

    In PyTorch, with ``positions`` the queries' positions among the keys::

        scores = q @ k.transpose(-1, -2) / K ** 0.5
        scores += bias[:, keys - positions[..., None] + S - 1]
        scores.masked_fill_(~visible, -inf)
        out = F.dropout(scores.softmax(-1), dropout) @ v

    Args:
        q: B,H,T,K. k, v: B,H,S,K.
        bias: H,N, the bias of distances ``-(S - 1) .. S - 1``.
        key_mask: B,S bool, True = attend.
        is_causal: a query sees keys up to its own position.
        query_positions: B,T int64; the last T positions by default.
        dropout: probability of dropping a weight, in steps of 2 ** -16 for ``cached``.
        impl: ``reference`` (PyTorch's attention on a materialised mask), ``cached`` (described
            above) or ``auto``: ``cached`` for float32 on the CPU.

    Returns:
        B,H,T,K, laid out in memory as B,T,H,K.

    Raises:
        ValueError: an unknown ``impl``.
    """
    if impl == "auto":
        impl = "cached" if q.device.type == "cpu" and q.dtype == torch.float32 else "reference"
    if impl == "reference":
        mask = visible_keys(q, k, key_mask, is_causal, query_positions)
        if bias is not None:
            pairs = bias_of_pairs(bias, k.shape[2], q.shape[2], query_positions).to(q.dtype)
            mask = pairs if mask is None else pairs.masked_fill(~mask, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    if impl == "cached":
        return CachedAttention.apply(q, k, v, bias, key_mask, is_causal, query_positions, dropout)
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference' or 'cached'")


def visible_keys(q, k, key_mask, is_causal, query_positions) -> torch.Tensor | None:
    """bool, broadcastable to B,H,T,S; ``None`` where every key is visible."""
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if not is_causal:
        return visible
    keys = torch.arange(k.shape[2], device=k.device)
    if query_positions is None:
        causal = keys <= keys[-q.shape[2] :].unsqueeze(-1)
    else:
        causal = (keys <= query_positions.unsqueeze(-1)).unsqueeze(1)
    return causal if visible is None else causal & visible


def bias_of_pairs(bias_HN, num_keys, num_queries, query_positions) -> torch.Tensor:
    """1,H,T,S (B,H,T,S with positions): query t's row is the window that starts at S - 1 - t."""
    windows_HSS = bias_HN.unfold(1, num_keys, 1).flip(1)
    if query_positions is None:
        return windows_HSS[:, num_keys - num_queries :].unsqueeze(0)
    return windows_HSS[:, query_positions].transpose(0, 1)


class CachedAttention(torch.autograd.Function):
    """A row and ``HEADS_AT_A_TIME`` heads at a time; the scores are computed again going back."""

    @staticmethod
    def forward(ctx, q, k, v, bias, key_mask, is_causal, query_positions, dropout):
        mask = additive_mask(q, k, key_mask, is_causal, query_positions)
        pairs = None
        if bias is not None:
            pairs = bias_of_pairs(bias, k.shape[2], q.shape[2], query_positions)
        out = empty_by_position(q)
        dropped = draw_dropped((*q.shape[:3], k.shape[2]), dropout) if dropout else None
        for chunk in chunks(q):
            weights = chunk_weights(chunk, q, k, pairs, mask)
            if dropped is not None:
                weights.masked_fill_(dropped[chunk], 0.0)
            out[chunk] = torch.bmm(weights, v[chunk])
        if dropped is not None:
            out /= 1.0 - drop_rate(dropout)
        ctx.save_for_backward(q, k, v, bias, mask, query_positions, dropped)
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, bias, mask, query_positions, dropped = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        pairs = grad_pairs = None
        if bias is not None:
            with torch.enable_grad():
                bias = bias.detach().requires_grad_()
                differentiable = bias_of_pairs(bias, k.shape[2], q.shape[2], query_positions)
            pairs = differentiable.detach()
            grad_pairs = torch.zeros_like(pairs)
        if dropped is not None:
            grad_out = grad_out / (1.0 - drop_rate(ctx.dropout))
        grads = [empty_by_position(x) for x in (q, k, v)]
        grad_q, grad_k, grad_v = grads
        for chunk in chunks(q):
            row, heads = chunk
            weights = chunk_weights(chunk, q, k, pairs, mask)
            grad_weights = torch.bmm(grad_out[chunk], v[chunk].transpose(1, 2))
            kept = weights
            if dropped is not None:
                grad_weights.masked_fill_(dropped[chunk], 0.0)
                kept = weights.masked_fill(dropped[chunk], 0.0)
            grad_v[chunk] = torch.bmm(kept.transpose(1, 2), grad_out[chunk])
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if grad_pairs is not None:
                grad_pairs[row if len(grad_pairs) > 1 else 0, heads] += grad_scores
            grad_q[chunk] = torch.bmm(grad_scores, k[chunk]).mul_(scale)
            grad_k[chunk] = torch.bmm(grad_scores.transpose(1, 2), q[chunk]).mul_(scale)
        grad_bias = None
        if bias is not None:
            (grad_bias,) = torch.autograd.grad(differentiable, bias, grad_pairs)
        return *grads, grad_bias, None, None, None, None


def chunks(q):
    """Indices (row, slice of heads)."""
    for row in range(q.shape[0]):
        for head in range(0, q.shape[1], HEADS_AT_A_TIME):
            yield row, slice(head, head + HEADS_AT_A_TIME)


def empty_by_position(x_BHTK: torch.Tensor) -> torch.Tensor:
    """B,H,T,K laid out in memory as B,T,H,K, so that joining the heads again copies nothing."""
    batch_size, num_heads, length, width = x_BHTK.shape
    return x_BHTK.new_empty(batch_size, length, num_heads, width).transpose(1, 2)


def chunk_weights(chunk, q, k, pairs, mask) -> torch.Tensor:
    """The softmax weights of one chunk: heads,T,S."""
    row, heads = chunk
    added = None if pairs is None else pairs[row if len(pairs) > 1 else 0, heads]
    if mask is not None:
        row_mask = mask[row if len(mask) > 1 else 0]
        added = row_mask if added is None else added + row_mask
    q_HTK, k_HKS = q[chunk], k[chunk].transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    if added is None:
        scores = torch.bmm(q_HTK, k_HKS).mul_(scale)
    else:
        scores = torch.baddbmm(added, q_HTK, k_HKS, alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def additive_mask(q, k, key_mask, is_causal, query_positions) -> torch.Tensor | None:
    """0 at visible keys and the lowest number elsewhere: B,1,T,S, or 1,1,T,S where rows agree."""
    visible = visible_keys(q, k, key_mask, is_causal, query_positions)
    if visible is None:
        return None
    visible = visible if visible.dim() == 4 else visible[None, None]
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(
        ~visible, torch.finfo(q.dtype).min
    )
    return mask.expand(-1, -1, q.shape[2], -1)


def drop_rate(dropout: float) -> float:
    """The probability that ``draw_dropped`` drops a weight: ``dropout`` in steps of 2 ** -16."""
    return round(dropout * 2**16) / 2**16


def draw_dropped(shape: tuple[int, ...], dropout: float) -> torch.Tensor:
    """bool, True with probability ``dropout``: 16 random bits each, from PyTorch's generator."""
    count = math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    threshold = round(dropout * 2**16) - 2**15
    return (bits.view(torch.int16)[:count] < threshold).view(shape)
