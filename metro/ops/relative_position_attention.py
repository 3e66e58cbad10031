"""Attention with a relative position bias, without B,H,T,S tensors kept for the backward pass.

On GPUs the kernels of :mod:`metro.ops.kernels.relative_position_attention` compute the weights a
tile at a time. On the CPU a head of one sequence is computed at a time, each core at its own, and
the backward pass computes the weights again, as Dao et al. (2022) do on GPUs. Only the inputs are
kept, and a bit for each weight that says whether it was dropped. One more q k^T is 1/7 of the
arithmetic of attention, which is itself about a tenth of a layer's at 512 tokens; causal attention
skips a quarter of the pairs.

Shapes: B batch, H heads, T queries, S keys, K head width, N = 2 S - 1 distances.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from metro.ops.dispatch import (
    cast_for_autocast,
    check_kernel,
    computed_type,
    is_eager_cpu,
    takes_kernel,
)
from metro.ops.dropout import (
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

SHORT = 128
"""Longest sequence, in tokens, of which the CPU attends all heads at once."""


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
        impl: ``reference`` (PyTorch's attention, on a materialised mask unless none is needed),
            ``cached`` (CPU, described above), ``triton`` (GPU), or ``auto``, see
            :func:`choose_impl`.

    Returns:
        B,H,T,K; of ``cached`` and ``triton`` laid out in memory as B,T,H,K.

    Raises:
        ValueError: an unknown ``impl``, ``cached`` on another device than the CPU, ``triton``
            where it cannot run, or on more queries than keys without positions.
    """
    if impl == "auto":
        impl = choose_impl(q, k, bias, key_mask, is_causal, query_positions, dropout)
    if impl == "triton":
        return attend_by_kernels(q, k, v, bias, key_mask, is_causal, query_positions, dropout)
    if impl == "reference":
        if is_only_causal(q, k, bias, key_mask, is_causal, query_positions):
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        mask = visible_keys(q, k, key_mask, is_causal, query_positions)
        if bias is not None:
            pairs = bias_of_pairs(bias, k.shape[2], q.shape[2], query_positions).to(q.dtype)
            mask = pairs if mask is None else pairs.masked_fill(~mask, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    if impl == "cached":
        if q.device.type != "cpu":
            raise ValueError(f"impl 'cached' is for the CPU, q is on {q.device}; use 'auto'")
        q, k, v = cast_for_autocast(q, k, v)
        return CachedAttention.apply(q, k, v, bias, key_mask, is_causal, query_positions, dropout)
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference', 'cached' or 'triton'")


def choose_impl(q, k, bias, key_mask, is_causal, query_positions, dropout) -> str:
    """Choose ``cached`` for long sequences on the CPU; on a GPU ``triton`` where it pays.

    On the CPU up to `SHORT` tokens PyTorch's attention of all heads at once is faster, three times
    at 64.

    On a GPU :func:`metro.ops.dispatch.takes_kernel` decides, but ``reference`` is taken where there
    is neither a bias nor a mask: there PyTorch has kernels that need none. So too for few pairs, as
    in generation, token by token.
    """
    if is_eager_cpu(q):
        return "cached" if q.shape[2] * k.shape[2] > SHORT**2 else "reference"
    if q.shape[2] < 16 or q.shape[2] * k.shape[2] < 64 * 64:
        return "reference"
    has_mask = bias is not None or key_mask is not None or is_causal
    if not has_mask or is_only_causal(q, k, bias, key_mask, is_causal, query_positions):
        return "reference"
    has_distances = bias is not None or is_causal  # positions matter to nothing else
    given = {
        "bias": bias is not None,
        "mask": key_mask is not None,
        "causal": is_causal,
        "positions": query_positions is not None and has_distances,
        "dropout": bool(dropout),
    }
    flags = [name for name, is_given in given.items() if is_given]
    name, width = "relative_position_attention", q.shape[-1]
    takes_it = takes_kernel(name, q.device, computed_type(q), width, *flags)
    return "triton" if takes_it else "reference"


def is_only_causal(q, k, bias, key_mask, is_causal, query_positions) -> bool:
    """Check whether PyTorch's attention has a flag for it, on a GPU; the CPU's stays as it is."""
    no_tensors = bias is None and key_mask is None and query_positions is None
    return is_causal and no_tensors and q.shape[2] == k.shape[2] and q.device.type == "cuda"


def attend_by_kernels(q, k, v, bias, key_mask, is_causal, query_positions, dropout):
    """Run ``impl="triton"``, after checks."""
    if not torch.compiler.is_compiling():
        check_kernel(q)
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch's attention does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check_for_kernels(q, k, v, bias, is_causal, query_positions, dropout)
    if not q.numel() or not k.numel():
        return relative_position_attention(
            q, k, v, bias, key_mask, is_causal, query_positions, dropout, impl="reference"
        )
    from metro.ops.kernels.relative_position_attention import attend

    return attend(q, k, v, bias, key_mask, is_causal, query_positions, dropout)


def check_for_kernels(q, k, v, bias, is_causal, query_positions, dropout) -> None:
    """Check what PyTorch's operations would notice; kernels do not."""
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v have shapes {shapes}; use B,H,T,K, B,H,S,K and B,H,S,K")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one type")
    (num_queries, num_keys), num_distances = (q.shape[2], k.shape[2]), 2 * k.shape[2] - 1
    if bias is not None and bias.shape != (q.shape[1], num_distances):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; use {(q.shape[1], num_distances)}, a value for "
            f"each head and distance of {num_keys} keys"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; use a probability below 1")
    has_distances = is_causal or bias is not None
    if num_queries > num_keys and has_distances and query_positions is None:
        raise ValueError(f"{num_queries} queries of {num_keys} keys: give query_positions")


def visible_keys(q, k, key_mask, is_causal, query_positions) -> torch.Tensor | None:
    """bool, broadcastable to B,H,T,S; ``None`` where every key is visible."""
    visible = None if key_mask is None else key_mask[:, None, None, :]
    is_last_alone = q.shape[2] == 1 and query_positions is None  # it sees what there is
    if not is_causal or is_last_alone:
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
    # Indexing by a tensor would sum its gradients in the order of the threads.
    rows = windows_HSS.index_select(1, query_positions.flatten())
    return rows.unflatten(1, query_positions.shape).transpose(0, 1)


class CachedAttention(torch.autograd.Function):
    """A head of one sequence at a time; its weights are computed again going back.

    Scores and weights are of the inputs' type. In half precision products and softmax sum in
    float32, and so does the gradient of the bias; what is rounded between them errs as PyTorch's
    operations do one by one, twice as much as its ``scaled_dot_product_attention``.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, key_mask, is_causal, query_positions, dropout):
        mask = additive_mask(q, k, key_mask, is_causal, query_positions)
        seed, kept_scale = seed_from_torch() if dropout else 0, scale_of_kept(dropout)
        ctx.in_blocks = is_causal and query_positions is None and q.shape[2] == k.shape[2]
        ctx.kept_scale, bits_H = kept_scale, [[] for _ in range(q.shape[1])]
        out = empty_by_position(q)

        def compute(head):
            random, buffer, bias_SS = random_of(seed, head), buffers_for(q, k, 1)[0], None
            if bias is not None:
                bias_SS = by_distance(bias[head].to(q.dtype).expand(k.shape[2], -1))
            for chunk in chunks(head, q, k, ctx.in_blocks):
                weights = chunk.weights(q, k, bias_SS, mask, query_positions, buffer)
                if dropout:
                    kept = draw_kept(weights.shape, dropout, random)
                    drop(weights, kept, out=weights)
                    bits_H[head].append(pack(kept))
                product(chunk.of_queries(out), weights, chunk.of_keys(v), kept_scale)

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
            buffers, bias_SS, grad_SN, num_read = buffers_for(q, k, 3), None, None, 0
            if bias is not None:
                bias_SS = by_distance(bias[head].to(q.dtype).expand(k.shape[2], -1))
                summed = torch.promote_types(bias.dtype, torch.float32)
                grad_SN = bias.new_zeros(k.shape[2], bias.shape[1], dtype=summed)
            for chunk in chunks(head, q, k, ctx.in_blocks):
                weights = chunk.weights(q, k, bias_SS, mask, query_positions, buffers[0])
                kept_weights, chunk_grad = weights, chunk.of_queries(grad_out)
                grad_weights = product(
                    chunk.matrix(buffers[1]), chunk_grad, chunk.of_keys(v).T, kept_scale
                )
                if bits_HN is not None:
                    kept = unpack(bits_HN[head, num_read:], weights.shape)
                    num_read += -(-weights.numel() // 8)
                    drop(grad_weights, kept, out=grad_weights)
                    kept_weights = drop(weights, kept, out=chunk.matrix(buffers[2]))
                # A sequence's first chunk has all keys: what was in memory before is ignored.
                seen = 0.0 if chunk.is_first else 1.0
                product(chunk.of_keys(grad_v), kept_weights.T, chunk_grad, kept_scale, seen)
                grad_scores = torch._softmax_backward_data(
                    grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
                )
                if grad_SN is not None:
                    rows = chunk.positions(q, k, query_positions)
                    grad_bias_SS = by_distance(grad_SN)[:, chunk.keys]
                    added = grad_scores.to(grad_SN.dtype)  # two types in one pass are slower
                    if query_positions is None:
                        grad_bias_SS[rows].add_(added)
                    else:
                        grad_bias_SS.index_add_(0, rows, added)
                product(chunk.of_queries(grad_q), grad_scores, chunk.of_keys(k), scale)
                product(chunk.of_keys(grad_k), grad_scores.T, chunk.of_queries(q), scale, seen)
            if grad_SN is not None:
                grad_bias[head] = grad_SN.sum(0)

        for_each(compute, range(q.shape[1]))
        return grad_q, grad_k, grad_v, grad_bias, None, None, None, None


def by_distance(x_SN: torch.Tensor) -> torch.Tensor:
    """S,S of which entry (query, key) is that of distance key - query in the query's row of S,N.

    A view: one step down is one step of distance back.
    """
    num_keys, num_distances = x_SN.shape
    size, strides = (num_keys, num_keys), (num_distances - 1, 1)
    return x_SN.contiguous().as_strided(size, strides, num_keys - 1)


class QueryChunk(NamedTuple):
    """A part computed at a time: queries of a head of one sequence, and the keys they may see.

    Its matrices fit in a core's cache, so that a pass over them costs little beside the products.
    """

    row: int
    head: int
    queries: slice
    keys: slice
    is_first: bool
    """True for the first chunk of its sequence."""

    def of_queries(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        return x_BHTK[self.row, self.head, self.queries]

    def of_keys(self, x_BHSK: torch.Tensor) -> torch.Tensor:
        return x_BHSK[self.row, self.head, self.keys]

    def of_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Of B,1,T,S or 1,1,T,S."""
        return mask[self.row if len(mask) > 1 else 0, 0, self.queries, self.keys]

    def positions(self, q, k, query_positions) -> slice | torch.Tensor:
        """Positions of the queries among the keys."""
        if query_positions is not None:
            return query_positions[self.row]
        shift = k.shape[2] - q.shape[2]
        return slice(self.queries.start + shift, self.queries.stop + shift)

    def matrix(self, buffer: torch.Tensor) -> torch.Tensor:
        """Queries by keys, in the memory of a flat buffer."""
        num_queries, num_keys = (part.stop - part.start for part in (self.queries, self.keys))
        return buffer[: num_queries * num_keys].view(num_queries, num_keys)

    def weights(self, q, k, bias_SS, mask, query_positions, buffer) -> torch.Tensor:
        """The softmax weights, in the memory of a flat buffer."""
        scores, added = self.matrix(buffer), []
        if bias_SS is not None:
            added.append(bias_SS[self.positions(q, k, query_positions), self.keys])
        if mask is not None:
            added.append(self.of_mask(mask))
        if len(added) == 2:
            torch.add(*added, out=scores)
        elif added:
            scores.copy_(added[0])
        seen = 1.0 if added else 0.0
        product(scores, self.of_queries(q), self.of_keys(k).T, q.shape[-1] ** -0.5, seen)
        return torch.softmax(scores, -1, out=scores)


def chunks(head: int, q: torch.Tensor, k: torch.Tensor, in_blocks: bool) -> Iterator[QueryChunk]:
    """All chunks of a head; ``in_blocks``, each block of queries with the keys up to its end.

    Sequences change fastest, so that a block's bias is used while it is in the cache.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    step = CAUSAL_BLOCK if in_blocks else num_queries
    for first in reversed(range(0, num_queries, step)):
        end = min(first + step, num_queries)
        keys = slice(0, end if in_blocks else num_keys)
        for row in range(q.shape[0]):
            yield QueryChunk(row, head, slice(first, end), keys, is_first=end == num_queries)


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


def additive_mask(q, k, key_mask, is_causal, query_positions) -> torch.Tensor | None:
    """0 at visible keys and the lowest number elsewhere: B,1,T,S, or 1,1,T,S where rows agree."""
    visible = visible_keys(q, k, key_mask, is_causal, query_positions)
    if visible is None:
        return None
    visible = visible if visible.dim() == 4 else visible[None, None]
    mask = torch.zeros(visible.shape, dtype=q.dtype)
    return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min).expand(-1, -1, q.shape[2], -1)
