"""Attention with a relative position bias, without B,H,T,S tensors kept for the backward pass.

On the CPU one row is computed at a time, and the backward pass computes its weights (and which of
them were dropped) again, as Dao et al. (2022) do on GPUs. Only the inputs are kept. One more q k^T
is 1/7 of the arithmetic of attention, which is itself about a tenth of a layer's at 512 tokens;
causal attention skips a quarter of the pairs.

Shapes: B batch, H heads, T queries, S keys, K head width, N = 2 S - 1 distances.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from metro.ops.dispatch import is_eager_cpu
from metro.ops.dropout import draw_kept, drop_rate, random_of, seed_from_torch

CAUSAL_BLOCK = 256
"""Queries at a time in causal attention; keys after the block are not looked at."""


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
        ValueError: an unknown ``impl``, or ``cached`` on another device.
    """
    if impl == "auto":
        impl = "cached" if is_eager_cpu(q) else "reference"
    if impl == "reference":
        mask = visible_keys(q, k, key_mask, is_causal, query_positions)
        if bias is not None:
            pairs = bias_of_pairs(bias, k.shape[2], q.shape[2], query_positions).to(q.dtype)
            mask = pairs if mask is None else pairs.masked_fill(~mask, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    if impl == "cached":
        if q.device.type != "cpu":
            raise ValueError(f"impl 'cached' is for the CPU, q is on {q.device}; use 'auto'")
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
    """A row at a time; its weights are computed again going back."""

    @staticmethod
    def forward(ctx, q, k, v, bias, key_mask, is_causal, query_positions, dropout):
        mask = additive_mask(q, k, key_mask, is_causal, query_positions)
        pairs = None
        if bias is not None:
            pairs = bias_of_pairs(bias, k.shape[2], q.shape[2], query_positions)
        seed = seed_from_torch() if dropout else None
        ctx.in_blocks = is_causal and query_positions is None and q.shape[2] == k.shape[2]
        out = empty_by_position(q)
        random = random_of(seed)
        for chunk in chunks(q, k, ctx.in_blocks):
            weights = chunk_weights(chunk, q, k, pairs, mask)
            if dropout:
                weights.mul_(draw_kept(weights.shape, dropout, random, weights.dtype))
            out[chunk.queries] = torch.bmm(weights, v[chunk.keys])
        if dropout:
            out /= 1.0 - drop_rate(dropout)
        ctx.save_for_backward(q, k, v, bias, mask, query_positions)
        ctx.dropout, ctx.seed = dropout, seed
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, bias, mask, query_positions = ctx.saved_tensors
        dropout, scale = ctx.dropout, q.shape[-1] ** -0.5
        pairs = grad_pairs = None
        if bias is not None:
            with torch.enable_grad():
                bias = bias.detach().requires_grad_()
                differentiable = bias_of_pairs(bias, k.shape[2], q.shape[2], query_positions)
            pairs = differentiable.detach()
            grad_pairs = torch.zeros_like(pairs)
        if dropout:
            grad_out = grad_out / (1.0 - drop_rate(dropout))
        grad_q, grad_k, grad_v = (empty_by_position(x) for x in (q, k, v))
        if ctx.in_blocks:
            grad_k.zero_(), grad_v.zero_()
        random = random_of(ctx.seed)
        for chunk in chunks(q, k, ctx.in_blocks):
            weights = kept_weights = chunk_weights(chunk, q, k, pairs, mask)
            grad_weights = torch.bmm(grad_out[chunk.queries], v[chunk.keys].transpose(1, 2))
            if dropout:
                kept = draw_kept(weights.shape, dropout, random, weights.dtype)
                grad_weights.mul_(kept)
                kept_weights = kept.mul_(weights)
            chunk_grad_v = torch.bmm(kept_weights.transpose(1, 2), grad_out[chunk.queries])
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if grad_pairs is not None:
                chunk.of_pairs(grad_pairs).add_(grad_scores)
            grad_q[chunk.queries] = torch.bmm(grad_scores, k[chunk.keys] * scale)
            chunk_grad_k = torch.bmm(grad_scores.transpose(1, 2), q[chunk.queries] * scale)
            if ctx.in_blocks:
                grad_k[chunk.keys] += chunk_grad_k
                grad_v[chunk.keys] += chunk_grad_v
            else:
                grad_k[chunk.keys] = chunk_grad_k
                grad_v[chunk.keys] = chunk_grad_v
        grad_bias = None
        if bias is not None:
            (grad_bias,) = torch.autograd.grad(differentiable, bias, grad_pairs)
        return grad_q, grad_k, grad_v, grad_bias, None, None, None, None


class Chunk(NamedTuple):
    """What is computed at a time: some queries of one row, and the keys they may see."""

    row: int
    first_query: int
    end_query: int
    num_keys: int

    @property
    def queries(self):
        """Index into B,H,T,K."""
        return self.row, slice(None), slice(self.first_query, self.end_query)

    @property
    def keys(self):
        """Index into B,H,S,K."""
        return self.row, slice(None), slice(0, self.num_keys)

    def of_pairs(self, x: torch.Tensor) -> torch.Tensor:
        """This chunk's part of B,H,T,S or 1,H,T,S."""
        row = self.row if len(x) > 1 else 0
        return x[row, :, self.first_query : self.end_query, : self.num_keys]


def chunks(q: torch.Tensor, k: torch.Tensor, in_blocks: bool) -> Iterator[Chunk]:
    """All chunks; ``in_blocks``, each block of queries with the keys up to its end."""
    num_queries = q.shape[2]
    step = CAUSAL_BLOCK if in_blocks else num_queries
    for row in range(q.shape[0]):
        for first in range(0, num_queries, step):
            end = min(first + step, num_queries)
            yield Chunk(row, first, end, end if in_blocks else k.shape[2])


def empty_by_position(x_BHTK: torch.Tensor) -> torch.Tensor:
    """B,H,T,K laid out in memory as B,T,H,K, so that joining the heads again copies nothing."""
    batch_size, num_heads, length, width = x_BHTK.shape
    return x_BHTK.new_empty(batch_size, length, num_heads, width).transpose(1, 2)


def chunk_weights(chunk: Chunk, q, k, pairs, mask) -> torch.Tensor:
    """The softmax weights of one chunk: heads, queries, keys."""
    added = None if pairs is None else chunk.of_pairs(pairs)
    if mask is not None:
        added = chunk.of_pairs(mask) if added is None else added + chunk.of_pairs(mask)
    scaled_q = q[chunk.queries] * q.shape[-1] ** -0.5
    k_HKS = k[chunk.keys].transpose(1, 2)
    scores = torch.bmm(scaled_q, k_HKS) if added is None else torch.baddbmm(added, scaled_q, k_HKS)
    return torch.softmax(scores, -1, out=scores)


def additive_mask(q, k, key_mask, is_causal, query_positions) -> torch.Tensor | None:
    """0 at visible keys and the lowest number elsewhere: B,1,T,S, or 1,1,T,S where rows agree."""
    visible = visible_keys(q, k, key_mask, is_causal, query_positions)
    if visible is None:
        return None
    visible = visible if visible.dim() == 4 else visible[None, None]
    mask = torch.zeros(visible.shape, dtype=q.dtype)
    return mask.masked_fill_(~visible, torch.finfo(q.dtype).min).expand(-1, -1, q.shape[2], -1)
