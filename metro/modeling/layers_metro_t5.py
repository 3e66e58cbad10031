"""The layers of METRO-T5 in plain PyTorch: relative position bias, attention, feed-forward, block, stack.

Gong et al. (ACL 2023), appendix A. Post-LayerNorm everywhere: ``x = LayerNorm(x + Dropout(f(x)))``.
Parameter names are those of the released METRO-T0 folders (``block.0.layer.0.SelfAttention.q.weight``).

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
    """Learned absolute positions; a class of its own because its fresh weights are drawn differently."""


class RelativePositionTable(nn.Embedding):
    """Relative position bias of each bucket and head; starts at zero."""


def eager_attention(q_BHTK, k_BHSK, v_BHSK, mask, is_causal, dropout):
    """``softmax(q k^T / sqrt(K) + mask) v`` written out.

    Returns:
        output B,H,T,K and the attention weights B,H,T,S before dropout.
    """
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])
    if is_causal:
        mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTK.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~mask, torch.finfo(scores_BHTS.dtype).min)
    elif mask is not None:
        scores_BHTS = scores_BHTS + mask
    weights_BHTS = scores_BHTS.softmax(-1, dtype=torch.float32).to(q_BHTK.dtype)
    return F.dropout(weights_BHTS, dropout) @ v_BHSK, weights_BHTS


class Attention(nn.Module):
    """Multi-head attention scaled by 1/sqrt(K), for self- and cross-attention.

    Args of ``forward``:
        hidden_BTD: the queries' hidden states.
        states_BSD: the hidden states that keys and values are made of.
        mask: ``None``, a bool tensor (True = attend) or an additive float one, broadcastable to B,H,T,S.
        is_causal: query t sees keys 0..t; only without ``mask``.
        cache: ``None`` or a key-value cache with ``is_complete``, ``states`` and ``update(keys, values)``.
        output_attentions: also return the attention weights.

    Returns:
        output B,T,D, and the attention weights B,H,T,S or ``None``.
    """

    def __init__(self, config, has_relative_attention_bias: bool = False):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.config = config
        self.q = nn.Linear(config.d_model, inner)
        self.k = nn.Linear(config.d_model, inner)
        self.v = nn.Linear(config.d_model, inner)
        self.o = nn.Linear(inner, config.d_model)
        if has_relative_attention_bias:
            self.relative_attention_bias = RelativePositionTable(
                config.relative_attention_num_buckets, config.num_heads
            )

    def split_heads(self, x_BTI: torch.Tensor) -> torch.Tensor:
        return x_BTI.unflatten(-1, (self.config.num_heads, self.config.d_kv)).transpose(1, 2)

    def position_bias(self, length: int) -> torch.Tensor:
        """The relative position bias H,T,T of this layer, looked up once per distance.

        The bias of a pair depends on ``key - query`` alone, so row t is the window of the 2T - 1
        distances that starts at ``T - 1 - t``; the backward pass sums diagonals, not lookups of pairs.
        """
        table_RH = self.relative_attention_bias.weight
        buckets = relative_position_buckets(
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
            length,
        )
        by_distance_HN = table_RH[buckets.to(table_RH.device)].T
        return by_distance_HN.unfold(1, length, 1).flip(1)

    def forward(
        self,
        hidden_BTD,
        states_BSD,
        mask=None,
        is_causal=False,
        cache=None,
        output_attentions=False,
    ):
        q_BHTK = self.split_heads(self.q(hidden_BTD))
        if cache is not None and cache.is_complete:
            k_BHSK, v_BHSK = cache.states
        else:
            k_BHSK, v_BHSK = (
                self.split_heads(self.k(states_BSD)),
                self.split_heads(self.v(states_BSD)),
            )
            if cache is not None:
                k_BHSK, v_BHSK = cache.update(k_BHSK, v_BHSK)
        dropout = self.config.attention_dropout_rate if self.training else 0.0
        if output_attentions or self.config._attn_implementation == "eager":
            out_BHTK, weights_BHTS = eager_attention(
                q_BHTK, k_BHSK, v_BHSK, mask, is_causal, dropout
            )
        else:
            weights_BHTS = None
            out_BHTK = F.scaled_dot_product_attention(
                q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
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
        attention_mask: key padding, causal or combined mask of the self-attention, see ``Attention``.
        is_causal: see ``Attention``.
        encoder_hidden_BSD, encoder_mask: what the cross-attention reads, and its key padding mask.
        positions_BM: compute outputs at these positions only; keys and values are still made of all.
        self_cache, cross_cache: see ``Attention``.
        output_attentions: also return the attention weights.

    Returns:
        hidden states B,T,D (B,M,D with ``positions_BM``), self- and cross-attention weights or ``None``.
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
        attention_mask=None,
        is_causal=False,
        encoder_hidden_BSD=None,
        encoder_mask=None,
        positions_BM=None,
        self_cache=None,
        cross_cache=None,
        output_attentions=False,
    ):
        states_BTD = hidden_BTD
        bias = (
            None if self.is_decoder else self.layer[0].attention.position_bias(hidden_BTD.shape[1])
        )
        if positions_BM is not None:
            hidden_BTD = gather_positions(hidden_BTD, positions_BM)
            bias = None if bias is None else bias[:, positions_BM].transpose(0, 1)
            if is_causal:
                keys = torch.arange(states_BTD.shape[1], device=positions_BM.device)
                attention_mask, is_causal = (keys <= positions_BM.unsqueeze(-1)).unsqueeze(1), False
            elif attention_mask is not None and attention_mask.shape[2] > 1:
                attention_mask = gather_positions(
                    attention_mask.squeeze(1).expand(len(positions_BM), -1, -1), positions_BM
                ).unsqueeze(1)
        if bias is not None:
            bias = bias.to(hidden_BTD.dtype)
            if attention_mask is not None:
                bias = torch.where(attention_mask, bias, torch.finfo(bias.dtype).min)
            attention_mask = bias if bias.dim() == 4 else bias.unsqueeze(0)
        hidden, self_weights = self.layer[0](
            hidden_BTD,
            states_BTD,
            mask=attention_mask,
            is_causal=is_causal,
            cache=self_cache,
            output_attentions=output_attentions,
        )
        cross_weights = None
        if self.is_decoder:
            hidden, cross_weights = self.layer[1](
                hidden,
                encoder_hidden_BSD,
                mask=encoder_mask,
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

    The row of the position table is ``pad_token_id`` plus the position counted from 1 over tokens that
    are not padding; padding reads the row ``pad_token_id``, which stays zero.

    Args:
        config: the model's :class:`MetroT5Config`.
        embed_tokens: the token embedding, shared with the rest of the model.
        is_decoder: decoder blocks (causal, cross-attention) instead of encoder blocks (relative bias).
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
            attention_mask: B,T (with a cache B,past+T), nonzero = attend; ``None`` means no padding.
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

        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        is_causal = self.is_decoder and mask is None and length > 1
        if is_causal and past_length or self.is_decoder and mask is not None:
            keys = torch.arange(past_length + length, device=hidden.device)
            causal = keys <= keys[past_length:].unsqueeze(-1)
            mask, is_causal = causal[None, None] if mask is None else causal & mask, False
        cross_mask = (
            None
            if encoder_attention_mask is None
            else encoder_attention_mask.ne(0)[:, None, None, :]
        )

        all_hidden, all_self, all_cross = [hidden], [], []
        for i, block in enumerate(self.block):
            self_cache, cross_cache = layer_caches[i] if layer_caches else (None, None)
            arguments = (
                hidden,
                mask,
                is_causal,
                encoder_hidden_states,
                cross_mask,
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

    Linear layers: normal with standard deviation ``(2 * out_features) ** -0.5``, biases zero (the tied
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
