"""Attention with a bucketed relative position bias, in plain PyTorch.

Gong et al. (ACL 2023), appendix A; attention as Vaswani et al. (2017), scaled by 1/sqrt(K).

Shapes: B batch, T query tokens, S key tokens, H heads, K head width, D d_model, R buckets,
N distances, M positions that are asked for in a last layer.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def relative_position_buckets(num_buckets: int, max_distance: int, length: int) -> torch.Tensor:
    """Bucket of every distance ``key - query`` from ``-(length - 1)`` to ``length - 1``.

    With ``half = num_buckets // 2`` and ``exact = half // 2``, a distance d falls in
    ``sign(d) * (|d| if |d| < exact else min(half - 1, exact + ceil(ln(|d| / exact)
    / ln((max_distance - 1) / exact) * (half - 1 - exact))))``, shifted by ``half - 1`` so that it
    starts at 0. Not the bucketing of T5. The highest bucket is ``num_buckets - 2``.

    Returns:
        int64 tensor of ``2 * length - 1`` buckets; entry ``length - 1`` is distance 0.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = torch.arange(1 - length, length, device="cpu")
    magnitude = distance.abs()
    # float32, as the original computes it: the ceiling sits on exact integers for some distances.
    far = torch.log(magnitude.clamp(min=1).float() / exact) / math.log((max_distance - 1) / exact)
    far = exact + torch.ceil(far * (half - 1 - exact)).long()
    bucket = torch.where(magnitude < exact, magnitude, far.clamp(max=half - 1))
    return distance.sign() * bucket + half - 1


class RelativePositionTable(nn.Embedding):
    """Relative position bias of each bucket and head; starts at zero.

    Called with a length, it returns H, 2 * length - 1: the bias of each distance.

    ``buckets`` holds those of the distances up to ``max_distance``, behind which there is only one.
    Computed on the CPU everywhere, so that the ceilings are those of the original.
    """

    buckets: torch.Tensor

    def __init__(self, config):
        super().__init__(config.relative_attention_num_buckets, config.num_heads)
        self.max_distance = config.relative_attention_max_distance
        self.register_buffer("buckets", self.find_buckets(), persistent=False)

    def find_buckets(self) -> torch.Tensor:
        return relative_position_buckets(
            self.num_embeddings, self.max_distance, self.max_distance + 1
        )

    def _apply(self, fn, recurse=True):
        """Compute the buckets anew: they are in no file, and ``to_empty`` leaves any memory."""
        super()._apply(fn, recurse)
        self.buckets = self.find_buckets().to(self.buckets.device)
        return self

    def forward(self, length: int) -> torch.Tensor:  # type: ignore[override]
        distance = torch.arange(1 - length, length, device=self.buckets.device)
        distance = distance.clamp(-self.max_distance, self.max_distance)
        return super().forward(self.buckets[distance + self.max_distance]).T


def is_captured() -> bool:
    """Whether PyTorch records the graph, to run it with other lengths: ``if`` must not ask them."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


class Visibility(NamedTuple):
    """The keys that a query sees."""

    key_mask: torch.Tensor | None = None
    """B,S bool, True = attend; ``None`` means every key."""
    is_causal: bool = False
    """A query sees only keys up to its own position."""
    query_positions: torch.Tensor | None = None
    """B,M positions of the queries among the keys; ``None`` means the last T, in order."""

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor | None:
        """True = attend, broadcastable to B,H,T,S; ``None`` where every query sees every key."""
        mask = None if self.key_mask is None else self.key_mask[:, None, None, :]
        if not self.is_causal:
            return mask
        if not is_captured() and num_queries == 1 and self.query_positions is None:
            return mask
        keys = torch.arange(num_keys, device=device)
        if self.query_positions is None:
            queries = keys[num_keys - num_queries :]
        else:
            queries = self.query_positions.unsqueeze(1)
        causal = keys <= queries.unsqueeze(-1)
        return causal if mask is None else causal & mask


EVERYTHING = Visibility()
"""Every query sees every key."""


def attend(
    q_BHTK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSK: torch.Tensor,
    bias_HN: torch.Tensor | None,
    visibility: Visibility,
    dropout: float,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``softmax(q k^T / sqrt(K) + bias) v`` over the visible keys, with dropout on the weights.

    Args:
        q_BHTK, k_BHSK, v_BHSK: queries, keys and values.
        bias_HN: relative position bias by distance, see :func:`bias_of_pairs`, or ``None``.
        visibility: which keys each query sees.
        dropout: probability of dropping an attention weight.
        return_weights: also return the weights, which are then materialised.

    Returns:
        output B,H,T,K, and the weights B,H,T,S before dropout or ``None``.
    """
    num_queries, num_keys = q_BHTK.shape[2], k_BHSK.shape[2]
    mask = visibility.mask(num_queries, num_keys, q_BHTK.device)
    if bias_HN is not None:
        bias = bias_of_pairs(bias_HN, num_keys, visibility.query_positions).to(q_BHTK.dtype)
        mask = bias if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)
    if not return_weights:
        no_tensors = visibility.key_mask is None and visibility.query_positions is None
        plainly_causal = visibility.is_causal and no_tensors and not is_captured()
        plainly_causal = plainly_causal and num_queries == num_keys > 1
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHSK,
            v_BHSK,
            attn_mask=None if plainly_causal else mask,
            dropout_p=dropout,
            is_causal=plainly_causal,
        )
        return out_BHTK, None
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~mask, torch.finfo(scores_BHTS.dtype).min)
    elif mask is not None:
        scores_BHTS = scores_BHTS + mask
    weights_BHTS = scores_BHTS.softmax(-1, dtype=torch.float32).to(q_BHTK.dtype)
    return F.dropout(weights_BHTS, dropout) @ v_BHSK, weights_BHTS


def bias_of_pairs(
    bias_HN: torch.Tensor, length: int, query_positions: torch.Tensor | None = None
) -> torch.Tensor:
    """The bias of every query-key pair of ``length`` positions.

    It depends on ``key - query`` alone, so query t's row is the window of the ``2 * length - 1``
    distances that starts at ``length - 1 - t``; the backward pass sums diagonals.

    Returns:
        1,H,T,T; B,H,M,T with ``query_positions`` B,M.
    """
    if is_captured():  # a window's length would be fixed
        keys = torch.arange(length, device=bias_HN.device)
        bias_HTT = bias_HN[:, keys - keys.unsqueeze(1) + length - 1]
    else:
        bias_HTT = bias_HN.unfold(1, length, 1).flip(1)
    if query_positions is None:
        return bias_HTT.unsqueeze(0)
    return bias_HTT[:, query_positions].transpose(0, 1)


def project_each(x_BTD: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """Each layer of the same input."""
    return [layer(x_BTD) for layer in layers]


class Attention(nn.Module):
    """Multi-head attention scaled by 1/sqrt(K), for self- and cross-attention.

    Args of ``forward``:
        hidden_BTD: the queries' hidden states.
        states_BSD: the hidden states that keys and values are made of.
        visibility: which keys each query sees.
        cache: ``None`` or a key-value cache with ``is_complete``, ``states`` and ``update(keys,
            values)``.
        output_attentions: also return the attention weights.

    Returns:
        output B,T,D, and the attention weights B,H,T,S or ``None``.
    """

    attend = staticmethod(attend)
    project = staticmethod(project_each)

    def __init__(self, config, has_relative_attention_bias: bool = False):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.config = config
        self.q = nn.Linear(config.d_model, inner)
        self.k = nn.Linear(config.d_model, inner)
        self.v = nn.Linear(config.d_model, inner)
        self.o = nn.Linear(inner, config.d_model)
        self.relative_attention_bias = None
        if has_relative_attention_bias:
            self.relative_attention_bias = RelativePositionTable(config)

    def split_heads(self, x_BTI: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x_BTI.shape
        return x_BTI.view(batch, length, self.config.num_heads, self.config.d_kv).transpose(1, 2)

    def bias_by_distance(self, length: int) -> torch.Tensor | None:
        """H, 2 * length - 1: the bias of each distance, ``None`` where there is no table."""
        if self.relative_attention_bias is None:
            return None
        return self.relative_attention_bias(length)

    def forward(
        self,
        hidden_BTD,
        states_BSD,
        visibility=EVERYTHING,
        cache=None,
        output_attentions=False,
    ):
        if cache is not None and cache.is_complete:
            q_BHTK = self.split_heads(*self.project(hidden_BTD, self.q))
            k_BHSK, v_BHSK = cache.states
        else:
            if hidden_BTD is states_BSD:
                projected = self.project(hidden_BTD, self.q, self.k, self.v)
            else:
                projected = self.project(hidden_BTD, self.q)
                projected += self.project(states_BSD, self.k, self.v)
            q_BHTK, k_BHSK, v_BHSK = map(self.split_heads, projected)
            if cache is not None:
                k_BHSK, v_BHSK = cache.update(k_BHSK, v_BHSK)
        eager = output_attentions or self.config._attn_implementation == "eager"
        out_BHTK, weights_BHTS = self.attend(
            q_BHTK,
            k_BHSK,
            v_BHSK,
            self.bias_by_distance(k_BHSK.shape[2]),
            visibility,
            self.config.attention_dropout_rate if self.training else 0.0,
            **({"return_weights": True} if eager else {}),
        )
        [out_BTD] = self.project(out_BHTK.transpose(1, 2).flatten(2), self.o)
        return out_BTD, weights_BHTS if output_attentions else None
