"""The layers of METRO-T5 in plain PyTorch: attention layer, feed-forward, block, stack.

Gong et al. (ACL 2023), appendix A. Post-LayerNorm everywhere: ``x = LayerNorm(x + Dropout(f(x)))``.
Parameter names are those of the released METRO-T0 folders.

Shapes: B batch, T query tokens, S key tokens, D d_model, M positions that are asked for in a last
layer.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_metro_t5 import (
    EVERYTHING,
    Attention,
    RelativePositionTable,
    Visibility,
    is_captured,
)


class PositionTable(nn.Embedding):
    """Learned absolute positions; a class of its own for how its fresh weights are drawn."""


def add_and_norm(x, residual, layer_norm: nn.LayerNorm, dropout: float, training: bool):
    """``LayerNorm(residual + Dropout(x))``."""
    return layer_norm(residual + F.dropout(x, dropout, training))


class AttentionLayer(nn.Module):
    """Attention, residual and LayerNorm. ``SelfAttention`` or ``EncDecAttention``, as released."""

    add_and_norm = staticmethod(add_and_norm)

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
        out_BTD = self.add_and_norm(
            out_BTD, hidden_BTD, self.layer_norm, self.dropout, self.training
        )
        return out_BTD, weights


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

    add_and_norm = staticmethod(add_and_norm)

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout_rate
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden_BTD):
        out_BTD = self.DenseReluDense(hidden_BTD)
        return self.add_and_norm(out_BTD, hidden_BTD, self.layer_norm, self.dropout, self.training)


class Block(GradientCheckpointingLayer):
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
        layers: list[nn.Module] = [
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
    """Output of a stack."""

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
        is_decoder: decoder blocks (causal, cross-attention) instead of encoder blocks (relative
            bias).
    """

    def __init__(self, config, is_decoder: bool):
        super().__init__()
        self.config = config
        self.is_decoder = is_decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.pos_embed = PositionTable(
            config.max_positions + config.pad_token_id + 1, config.d_model, config.pad_token_id
        )
        self.first_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.block = nn.ModuleList(Block(config, is_decoder) for _ in range(num_layers))

    def embed(self, input_ids, inputs_embeds) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            stack = "decoder" if self.is_decoder else "encoder"
            raise ValueError(f"give the {stack} input_ids or inputs_embeds: one of the two")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def position_ids(
        self,
        mask_BS: torch.Tensor | None,
        length: int,
        past: int | torch.Tensor,
        static_length: int | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Rows of the position table for the last ``length`` of ``past + length`` positions."""
        pad = self.config.pad_token_id
        # A static cache is measured as a whole: to look at the tensor `past` would wait for it.
        longest = past + length if static_length is None else static_length
        if not is_captured() and longest > self.config.max_positions:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than max_positions "
                f"({self.config.max_positions}); truncate the input"
            )
        if mask_BS is None:
            positions = torch.arange(length, device=device)
            return (positions + (pad + 1 + past)).unsqueeze(0)
        return (mask_BS.cumsum(1, dtype=torch.long) * mask_BS + pad)[:, -length:]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        layer_caches: list | None = None,
        past_length: int | torch.Tensor = 0,
        static_length: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
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
            static_length: how many keys caches of a fixed size return, unwritten ones included;
                ``None`` for caches that grow.
            output_hidden_states, output_attentions: return them too; ``None`` means as ``config``
                says.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        embeds = self.embed(input_ids, inputs_embeds)
        length = embeds.shape[1]
        mask_BS = None if attention_mask is None else attention_mask.ne(0)
        rows = self.position_ids(mask_BS, length, past_length, static_length, embeds.device)
        hidden = self.first_layer_norm(embeds + self.pos_embed(rows))
        hidden = F.dropout(hidden, config.dropout_rate, self.training)
        if mask_BS is not None and not self.is_decoder:
            hidden = hidden * mask_BS.unsqueeze(-1)

        visibility = Visibility(mask_BS, is_causal=self.is_decoder)
        if static_length is not None:
            queries = torch.arange(length, device=hidden.device) + past_length
            if mask_BS is not None:
                mask_BS = F.pad(mask_BS, (0, static_length - mask_BS.shape[1]))
            visibility = Visibility(
                mask_BS, is_causal=True, query_positions=queries.expand(len(hidden), -1)
            )
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

    Linear layers: normal with standard deviation ``(2 * out_features) ** -0.5``, biases zero. The
    tied token embedding counts as the output projection, its ``out_features`` is the vocabulary.
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
        module.buckets.copy_(module.find_buckets())
    elif isinstance(module, PositionTable):
        bound = factor * math.sqrt(3.0) * (2 * module.embedding_dim) ** -0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=factor * (2 * module.num_embeddings) ** -0.5)
