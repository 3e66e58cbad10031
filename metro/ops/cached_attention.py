"""Attention on the CPU, a head of one sequence at a time, computed again in the backward pass.

Dao et al. (2022) do so on GPUs. Only the inputs are kept, and a bit for each weight that says
whether it was dropped. One more q k^T is 1/7 of the arithmetic of attention, which is itself about
a tenth of a layer's at 512 tokens; causal attention skips a quarter of the pairs. Each core
computes heads of its own.

Shapes: B batch, H heads, T queries, S keys, K head width, N = 2 S - 1 distances.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from metro.ops.dropout import (
    bit_masks,
    draw_kept,
    drop,
    pack,
    random_of,
    scale_of_kept,
    seed_from_torch,
    unpack,
)
from metro.ops.threads import for_each

CAUSAL_BLOCK = 256
"""Queries at a time in causal attention; keys after the block are not looked at."""


class CachedAttention(torch.autograd.Function):
    """Computes softmax weights once more going back.

    Scores and weights are of the inputs' type. In half precision products and softmax sum in
    float32, and so does the gradient of the bias; what is rounded between them errs as PyTorch's
    operations do one by one, twice as much as its ``scaled_dot_product_attention``.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, is_causal, query_positions, dropout):
        seed, kept_scale = seed_from_torch() if dropout else 0, scale_of_kept(dropout)
        ctx.in_blocks = is_causal and query_positions is None and q.shape[2] == k.shape[2]
        ctx.kept_scale, bits_H = kept_scale, [[] for _ in range(q.shape[1])]
        out = empty_by_position(q)

        def compute(head):
            random, (buffer,) = random_of(seed, head), buffers_for(q, k, 1)
            bias_SS = None if bias is None else bias_of_head(bias[head].to(q.dtype), k.shape[2])
            for chunk in chunks(head, q, k, ctx.in_blocks):
                weights = chunk.matrix(buffer)
                rows = zip(
                    chunk.added_scores(q, k, bias_SS, mask, query_positions),
                    *map(chunk.of_queries, (q, out)),
                    *map(chunk.of_keys, (k, v)),
                    strict=True,
                )
                for added_TS, q_TK, out_TK, k_SK, v_SK in rows:
                    softmax_weights(q_TK, k_SK, added_TS, out=weights)
                    if dropout:
                        kept = draw_kept(weights.shape, dropout, random)
                        drop(weights, bit_masks(kept, weights.dtype), out=weights)
                        bits_H[head].append(pack(kept))
                    product(out_TK, weights, v_SK, kept_scale)

        for_each(compute, range(q.shape[1]))
        bits_HN = torch.stack([torch.cat(bits) for bits in bits_H]) if dropout else None
        ctx.save_for_backward(q, k, v, bias, mask, query_positions, bits_HN)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, bias, mask, query_positions, bits_HN = ctx.saved_tensors
        scale, kept_scale = q.shape[-1] ** -0.5, ctx.kept_scale
        grad_q, grad_k, grad_v = (empty_by_position(x) for x in (q, k, v))
        grad_bias = None if bias is None else torch.empty_like(bias)

        def compute(head):
            buffers, bias_SS, grad_SN, num_read = buffers_for(q, k, 2), None, None, 0
            if bias is not None:
                bias_SS = bias_of_head(bias[head].to(q.dtype), k.shape[2])
                summed = torch.promote_types(bias.dtype, torch.float32)
                grad_SN = bias.new_zeros(k.shape[2], bias.shape[1], dtype=summed)
            for chunk in chunks(head, q, k, ctx.in_blocks):
                weights, grad_weights = map(chunk.matrix, buffers)
                # A sequence's first chunk has all keys: what was in memory before is ignored.
                seen = 0.0 if chunk.is_first else 1.0
                rows = zip(
                    chunk.added_scores(q, k, bias_SS, mask, query_positions),
                    *map(chunk.of_queries, (q, grad_q, grad_out)),
                    *map(chunk.of_keys, (k, grad_k, v, grad_v)),
                    strict=True,
                )
                for row, (added_TS, *of_row) in enumerate(rows):
                    q_TK, grad_q_TK, grad_TK, k_SK, grad_k_SK, v_SK, grad_v_SK = of_row
                    kept_weights = softmax_weights(q_TK, k_SK, added_TS, out=weights)
                    product(grad_weights, grad_TK, v_SK.T, kept_scale)
                    if bits_HN is not None:
                        kept = unpack(bits_HN[head, num_read:], weights.shape)
                        num_read += -(-weights.numel() // 8)
                        masks = bit_masks(kept, weights.dtype)
                        drop(grad_weights, masks, out=grad_weights)
                        kept_weights = drop(weights, masks, out=masks.view(weights.dtype))
                    product(grad_v_SK, kept_weights.T, grad_TK, kept_scale, seen)
                    grad_scores = torch._softmax_backward_data(
                        grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
                    )
                    if grad_SN is not None:
                        add_by_distance(
                            grad_scores, grad_SN, chunk.positions(q, k, query_positions, row)
                        )
                    product(grad_q_TK, grad_scores, k_SK, scale)
                    product(grad_k_SK, grad_scores.T, q_TK, scale, seen)
            if grad_SN is not None:
                grad_bias[head] = grad_SN.sum(0)

        for_each(compute, range(q.shape[1]))
        return grad_q, grad_k, grad_v, grad_bias, None, None, None, None


def by_distance(x_SN: torch.Tensor) -> torch.Tensor:
    """S,S of which entry (query, key) is that of distance key - query in the query's row of S,N.

    A view: one step down is one step of distance back.
    """
    num_keys, num_distances = x_SN.shape
    return x_SN.as_strided((num_keys, num_keys), (num_distances - 1, 1), num_keys - 1)


def bias_of_head(bias_N: torch.Tensor, num_keys: int) -> torch.Tensor:
    """S,S of queries by keys."""
    return by_distance(bias_N.expand(num_keys, -1).contiguous())


def add_by_distance(x_TS: torch.Tensor, sum_SN: torch.Tensor, positions) -> None:
    """Add to rows of those positions in ``sum_SN``, seen as :func:`by_distance` does."""
    sum_TS = by_distance(sum_SN)[:, : x_TS.shape[1]]
    added_TS = x_TS.to(sum_SN.dtype)  # two types in one pass are slower
    if isinstance(positions, slice):
        sum_TS[positions].add_(added_TS)
    else:
        sum_TS.index_add_(0, positions, added_TS)


class QueryChunk(NamedTuple):
    """A part computed at a time: queries of a head, and the keys they may see.

    Of one sequence after the other: its matrices fit in a core's cache, so that a pass over them
    costs little beside the products.
    """

    head: int
    queries: slice
    keys: slice
    """From the first key on."""
    is_first: bool
    """True for the first chunk of its head."""

    def of_queries(self, x_BHTK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """T,K of each sequence."""
        return x_BHTK[:, self.head, self.queries].unbind()

    def of_keys(self, x_BHSK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """S,K of each sequence."""
        return x_BHSK[:, self.head, self.keys].unbind()

    def positions(self, q, k, query_positions, row: int) -> slice | torch.Tensor:
        """Positions of a sequence's queries among the keys."""
        if query_positions is not None:
            return query_positions[row]
        shift = k.shape[2] - q.shape[2]
        return slice(self.queries.start + shift, self.queries.stop + shift)

    def matrix(self, buffer: torch.Tensor) -> torch.Tensor:
        """Queries by keys, in the memory of a flat buffer."""
        num_queries, num_keys = (part.stop - part.start for part in (self.queries, self.keys))
        return buffer[: num_queries * num_keys].view(num_queries, num_keys)

    def added_scores(self, q, k, bias_SS, mask, query_positions) -> Iterator[torch.Tensor | None]:
        """For each sequence what is added to its scores, bias and mask."""
        is_shared = query_positions is None and (mask is None or len(mask) == 1)
        for row in range(1 if is_shared else len(q)):
            added = []
            if bias_SS is not None:
                added.append(bias_SS[self.positions(q, k, query_positions, row), self.keys])
            if mask is not None:
                added.append(mask[row if len(mask) > 1 else 0, 0, self.queries, self.keys])
            of_row = added[0] + added[1] if len(added) == 2 else next(iter(added), None)
            yield from itertools.repeat(of_row, len(q) if is_shared else 1)


def chunks(head: int, q: torch.Tensor, k: torch.Tensor, in_blocks: bool) -> Iterator[QueryChunk]:
    """All chunks of a head; ``in_blocks``, each block of queries with the keys up to its end."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    step = CAUSAL_BLOCK if in_blocks else num_queries
    for first in reversed(range(0, num_queries, step)):
        end = min(first + step, num_queries)
        keys = slice(0, end if in_blocks else num_keys)
        yield QueryChunk(head, slice(first, end), keys, is_first=end == num_queries)


def softmax_weights(q_TK, k_SK, added_TS: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T / sqrt(K) + added)``, written to ``out``."""
    given, seen = (out, 0.0) if added_TS is None else (added_TS, 1.0)
    torch.addmm(given, q_TK, k_SK.T, beta=seen, alpha=q_TK.shape[-1] ** -0.5, out=out)
    return torch.softmax(out, -1, out=out)


def buffers_for(q: torch.Tensor, k: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Flat memory for matrices of queries by keys."""
    return [q.new_empty(q.shape[2] * k.shape[2]) for _ in range(count)]


def product(out, a, b, scale: float, seen: float = 0.0) -> torch.Tensor:
    """``out = seen * out + scale * a @ b`` in place: parts of the heads are read in place."""
    return torch.addmm(out, a, b, beta=seen, alpha=scale, out=out)


def empty_by_position(x_BHTK: torch.Tensor) -> torch.Tensor:
    """B,H,T,K laid out in memory as B,T,H,K, so that joining the heads again copies nothing."""
    batch_size, num_heads, length, width = x_BHTK.shape
    return x_BHTK.new_empty(batch_size, length, num_heads, width).transpose(1, 2)
