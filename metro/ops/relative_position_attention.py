"""Attention with a relative position bias, without B,H,T,S tensors kept for the backward pass.

On GPUs the kernels of :mod:`metro.ops.kernels.relative_position_attention` compute the weights a
tile at a time, on the CPU :mod:`metro.ops.cached_attention` does those of a head of one sequence.

Shapes: B batch, H heads, T queries, S keys, K head width, N = 2 S - 1 distances.
"""

import torch
import torch.nn.functional as F

from metro.ops.cached_attention import CachedAttention
from metro.ops.dispatch import (
    attends_in_float32,
    cast_for_autocast,
    check_kernel,
    computed_type,
    is_eager_cpu,
    takes_kernel,
)

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
            ``cached`` (CPU), ``triton`` (GPU), or ``auto``, see
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
        return attend_by_pytorch(q, k, v, mask, dropout)
    if impl == "cached":
        if q.device.type != "cpu":
            raise ValueError(f"impl 'cached' is for the CPU, q is on {q.device}; use 'auto'")
        q, k, v = cast_for_autocast(q, k, v)
        mask = additive_mask(q, k, key_mask, is_causal, query_positions)
        return CachedAttention.apply(q, k, v, bias, mask, is_causal, query_positions, dropout)
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


def attend_by_pytorch(q, k, v, mask, dropout) -> torch.Tensor:
    """PyTorch's attention; where it would take flash attention and round, in float32."""
    takes_flash = not dropout and (mask is None or not mask.requires_grad)
    if not (takes_flash and attends_in_float32(q)):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    return out.to(computed_type(q))


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


def additive_mask(q, k, key_mask, is_causal, query_positions) -> torch.Tensor | None:
    """0 at visible keys and the lowest number elsewhere: B,1,T,S, or 1,1,T,S where rows agree."""
    visible = visible_keys(q, k, key_mask, is_causal, query_positions)
    if visible is None:
        return None
    visible = visible if visible.dim() == 4 else visible[None, None]
    mask = torch.zeros(visible.shape, dtype=q.dtype)
    return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min).expand(-1, -1, q.shape[2], -1)
