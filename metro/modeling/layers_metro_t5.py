"""The layers of METRO-T5 in plain PyTorch: position bias, attention, feed-forward, block, stack.

Gong et al. (ACL 2023), appendix A. Post-LayerNorm everywhere: ``x = LayerNorm(x + Dropout(f(x)))``.
Parameter names are those of the released METRO-T0 folders.

Shapes: B batch, T query tokens, S key tokens, H heads, K head width, D d_model, R buckets,
M positions that are asked for in a last layer.
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
    distance = torch.arange(1 - length, length)
    magnitude = distance.abs()
    # float32, as the original computes it: the ceiling sits on exact integers for some distances.
    far = torch.log(magnitude.clamp(min=1).float() / exact) / math.log((max_distance - 1) / exact)
    far = exact + torch.ceil(far * (half - 1 - exact)).long()
    bucket = torch.where(magnitude < exact, magnitude, far.clamp(max=half - 1))
    return distance.sign() * bucket + half - 1


class PositionTable(nn.Embedding):
    """Learned absolute positions; a class of its own for how its fresh weights are drawn."""


class RelativePositionTable(nn.Embedding):
    """Relative position bias of each bucket and head; starts at zero."""


class Visibility(NamedTuple):
    """Which keys a query sees."""

    key_mask: torch.Tensor | None = None
    """B,S bool, True = attend; ``None`` means every key."""
    is_causal: bool = False
    """Whether a query sees only keys up to its own position."""
    query_positions: torch.Tensor | None = None
    """B,M positions of the queries among the keys; ``None`` means the last T, in order."""

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor | None:
        """True = attend, broadcastable to B,H,T,S; ``None`` where every query sees every key."""
        mask = None if self.key_mask is None else self.key_mask[:, None, None, :]
        if not self.is_causal or (num_queries == 1 and self.query_positions is None):
            return mask
        keys = torch.arange(num_keys, device=device)
        queries = keys[num_keys - num_queries :] if self.query_positions is None else None
        queries = self.query_positions.unsqueeze(1) if queries is None else queries
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
        plainly_causal = visibility.is_causal and no_tensors and num_queries == num_keys > 1
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
    bias_HTT = bias_HN.unfold(1, length, 1).flip(1)
    if query_positions is None:
        return bias_HTT.unsqueeze(0)
    return bias_HTT[:, query_positions].transpose(0, 1)


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
            self.relative_attention_bias = RelativePositionTable(
                config.relative_attention_num_buckets, config.num_heads
            )

    def split_heads(self, x_BTI: torch.Tensor) -> torch.Tensor:
        return x_BTI.unflatten(-1, (self.config.num_heads, self.config.d_kv)).transpose(1, 2)

    def bias_by_distance(self, length: int) -> torch.Tensor | None:
        """H, 2 * length - 1: the bias of each distance, ``None`` where there is no table."""
        if self.relative_attention_bias is None:
            return None
        table_RH = self.relative_attention_bias.weight
        buckets = relative_position_buckets(
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
            length,
        )
        return table_RH[buckets.to(table_RH.device)].T

    def forward(
        self,
        hidden_BTD,
        states_BSD,
        visibility=EVERYTHING,
        cache=None,
        output_attentions=False,
    ):
        q_BHTK = self.split_heads(self.q(hidden_BTD))
        if cache is not None and cache.is_complete:
            k_BHSK, v_BHSK = cache.states
        else:
            k_BHSK, v_BHSK = (self.split_heads(proj(states_BSD)) for proj in (self.k, self.v))
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
        out_BTD = self.o(out_BHTK.transpose(1, 2).flatten(2))
        return out_BTD, weights_BHTS if output_attentions else None


class AttentionLayer(nn.Module):
    """Attention, residual and LayerNorm. ``SelfAttention`` or ``EncDecAttention``, as released."""

    def __init__(self, config, name: str, has_relative_attention_bias: bool = False):
        super().__init__()
        self.name = name
        self.dropout = config.dropout_rate
        self.add_module(name, Attention(config, has_relative_attention_bias))
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    @property
    def attention(self) -> Attention:
        return getattr(self, self.name)

    def forward(self, hidden_BTD, states_BSD, **kwargs):
        out_BTD, weights = self.attention(hidden_BTD, states_BSD, **kwargs)
        out_BTD = F.dropout(out_BTD, self.dropout, self.training)
        return self.layer_norm(hidden_BTD + out_BTD), weights


class FeedForward(nn.Module):
    """``wo(Dropout(activation(wi(x))))`` with biases."""

    def __init__(self, config):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff)
        self.wo = nn.Linear(config.d_ff, config.d_model)
        self.activation = {"relu": F.relu, "gelu": F.gelu}[config.feed_forward_proj]
        self.dropout = config.activation_dropout_rate

    def forward(self, hidden_BTD):
        return self.wo(F.dropout(self.activation(self.wi(hidden_BTD)), self.dropout, self.training))


class FeedForwardLayer(nn.Module):
    """Feed-forward, residual and LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout_rate
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden_BTD):
        out_BTD = F.dropout(self.DenseReluDense(hidden_BTD), self.dropout, self.training)
        return self.layer_norm(hidden_BTD + out_BTD)


class Block(nn.Module):
    """One encoder or decoder layer: self-attention, cross-attention (decoder), feed-forward.

    Args of ``forward``:
        hidden_BTD: hidden states of all positions.
        visibility: which keys the self-attention's queries see.
        encoder_hidden_BSD, encoder_visibility: what the cross-attention reads and sees.
        positions_BM: compute outputs at these positions only; keys and values are still made of
            all.
        self_cache, cross_cache: see :class:`Attention`.
        output_attentions: also return the attention weights.

    Returns:
        hidden states B,T,D (B,M,D with ``positions_BM``), self- and cross-attention weights or
        ``None``.
    """

    def __init__(self, config, is_decoder: bool):
        super().__init__()
        self.is_decoder = is_decoder
        layers = [
            AttentionLayer(config, "SelfAttention", has_relative_attention_bias=not is_decoder)
        ]
        if is_decoder:
            layers.append(AttentionLayer(config, "EncDecAttention"))
        layers.append(FeedForwardLayer(config))
        self.layer = nn.ModuleList(layers)

    def forward(
        self,
        hidden_BTD,
        visibility=EVERYTHING,
        encoder_hidden_BSD=None,
        encoder_visibility=EVERYTHING,
        positions_BM=None,
        self_cache=None,
        cross_cache=None,
        output_attentions=False,
    ):
        queries = hidden_BTD
        if positions_BM is not None:
            queries = gather_positions(hidden_BTD, positions_BM)
            visibility = visibility._replace(query_positions=positions_BM)
        hidden, self_weights = self.layer[0](
            queries,
            hidden_BTD,
            visibility=visibility,
            cache=self_cache,
            output_attentions=output_attentions,
        )
        cross_weights = None
        if self.is_decoder:
            hidden, cross_weights = self.layer[1](
                hidden,
                encoder_hidden_BSD,
                visibility=encoder_visibility,
                cache=cross_cache,
                output_attentions=output_attentions,
            )
        return self.layer[-1](hidden), self_weights, cross_weights


def gather_positions(x_BTD: torch.Tensor, positions_BM: torch.Tensor) -> torch.Tensor:
    """``x[b, positions[b, m]]``: B,T,D and B,M to B,M,D."""
    return x_BTD.gather(1, positions_BM.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))


class StackOutput(NamedTuple):
    """What a stack returns."""

    last_hidden_state: torch.Tensor
    """B,T,D; B,M,D where positions were asked for."""
    hidden_states: tuple[torch.Tensor, ...] | None
    """The embedding's output and each layer's, where asked for."""
    attentions: tuple[torch.Tensor, ...] | None
    """Self-attention weights of each layer, where asked for."""
    cross_attentions: tuple[torch.Tensor, ...] | None
    """Cross-attention weights of each layer, where asked for."""


class MetroT5Stack(nn.Module):
    """Embedding and blocks of an encoder or of a decoder.

    The row of the position table is ``pad_token_id`` plus the position counted from 1 over tokens
    that are not padding; padding reads the row ``pad_token_id``, which stays zero.

    Args:
        config: the model's :class:`MetroT5Config`.
        embed_tokens: the token embedding, shared with the rest of the model.
        is_decoder: decoder blocks (causal, cross-attention) instead of encoder blocks (relative
            bias).
    """

    def __init__(self, config, embed_tokens: nn.Embedding, is_decoder: bool):
        super().__init__()
        self.config = config
        self.is_decoder = is_decoder
        self.gradient_checkpointing = False
        self.embed_tokens = embed_tokens
        self.pos_embed = PositionTable(
            config.max_positions + config.pad_token_id + 1, config.d_model, config.pad_token_id
        )
        self.first_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.block = nn.ModuleList(Block(config, is_decoder) for _ in range(num_layers))

    def position_ids(self, mask_BS: torch.Tensor | None, length: int, past: int) -> torch.Tensor:
        """Rows of the position table for the last ``length`` of ``past + length`` positions."""
        pad = self.config.pad_token_id
        if past + length > self.config.max_positions:
            raise ValueError(
                f"a sequence of {past + length} tokens is longer than max_positions "
                f"({self.config.max_positions}); truncate the input"
            )
        if mask_BS is None:
            device = self.pos_embed.weight.device
            return torch.arange(pad + 1 + past, pad + 1 + past + length, device=device).unsqueeze(0)
        return (mask_BS.cumsum(1) * mask_BS + pad)[:, -length:]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        layer_caches: list | None = None,
        past_length: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> StackOutput:
        """Run the stack.

        Args:
            input_ids: B,T token ids, or ``inputs_embeds`` B,T,D instead.
            attention_mask: B,T (with a cache B,past+T), nonzero = attend; ``None`` means no
                padding.
            encoder_hidden_states, encoder_attention_mask: B,S,D and B,S for a decoder.
            positions: B,M, outputs of the last layer wanted; all by default.
            layer_caches: per layer a pair (self, cross) of caches, see :class:`Attention`.
            past_length: tokens already in the caches.
        """
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = embeds.shape[1]
        mask_BS = None if attention_mask is None else attention_mask.ne(0)
        rows = self.position_ids(mask_BS, length, past_length)
        hidden = self.first_layer_norm(embeds + self.pos_embed(rows))
        hidden = F.dropout(hidden, self.config.dropout_rate, self.training)
        if mask_BS is not None and not self.is_decoder:
            hidden = hidden * mask_BS.unsqueeze(-1)

        visibility = Visibility(mask_BS, is_causal=self.is_decoder)
        encoder_visibility = Visibility(
            None if encoder_attention_mask is None else encoder_attention_mask.ne(0)
        )
        all_hidden, all_self, all_cross = [hidden], [], []
        for i, block in enumerate(self.block):
            self_cache, cross_cache = layer_caches[i] if layer_caches else (None, None)
            arguments = (
                hidden,
                visibility,
                encoder_hidden_states,
                encoder_visibility,
                positions if i == len(self.block) - 1 else None,
                self_cache,
                cross_cache,
                output_attentions,
            )
            if self.gradient_checkpointing and self.training:
                hidden, self_weights, cross_weights = self._gradient_checkpointing_func(
                    block.__call__, *arguments
                )
            else:
                hidden, self_weights, cross_weights = block(*arguments)
            all_hidden.append(hidden)
            all_self.append(self_weights)
            all_cross.append(cross_weights)
        return StackOutput(
            hidden,
            tuple(all_hidden) if output_hidden_states else None,
            tuple(all_self) if output_attentions else None,
            tuple(all_cross) if output_attentions and self.is_decoder else None,
        )


@torch.no_grad()
def initialize_weights(module: nn.Module, factor: float = 1.0) -> None:
    """Draw the weights of one module as the original does for its main model.

    Linear layers: normal with standard deviation ``(2 * out_features) ** -0.5``, biases zero (the
        tied
    token embedding counts as the output projection, so its ``out_features`` is the vocabulary).
    Position tables: uniform with standard deviation ``(2 * d_model) ** -0.5``, padding row zero.
    Relative position bias: zero.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=factor * (2 * module.out_features) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, RelativePositionTable):
        nn.init.zeros_(module.weight)
    elif isinstance(module, PositionTable):
        bound = factor * math.sqrt(3.0) * (2 * module.embedding_dim) ** -0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=factor * (2 * module.num_embeddings) ** -0.5)
