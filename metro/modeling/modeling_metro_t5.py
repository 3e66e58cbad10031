"""METRO-T5 (Gong et al., ACL 2023) as Hugging Face models, with ``generate``, saving and loading.

Where things are, from the outside in:

- here: ``MetroT5ForConditionalGeneration`` (embedding, encoder, decoder, output projection, loss,
  caches of generation) and ``MetroT5EncoderModel``;
- ``layers_metro_t5``: ``MetroT5Stack`` (encoder or decoder), its blocks, initial weights;
- ``attention_metro_t5``: attention, its relative position bias, which keys are visible;
- ``configuration_metro_t5``: sizes; ``tokenization_metro_t5``, ``text_metro_t5``: text to ids.

Shapes: B batch, S source tokens, T target tokens, D d_model, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_metro_t5 import MetroT5Config
from .layers_metro_t5 import MetroT5Stack, initialize_weights


class SelfAttentionCache:
    """Takes the keys and values of each step; never complete.

    ``positions``: where a cache of a fixed size writes them, which newer transformers know anyhow.
    """

    is_complete = False

    def __init__(self, cache: EncoderDecoderCache, layer: int, positions: torch.Tensor | None):
        self.cache, self.layer = cache.self_attention_cache, layer
        self.options = {"cache_position": positions}

    def update(self, keys, values):
        return self.cache.update(keys, values, self.layer, self.options)


class CrossAttentionCache:
    """Holds the keys and values of the encoder's output, made at the first step."""

    def __init__(self, cache: EncoderDecoderCache, layer: int):
        self.cache, self.layer = cache, layer

    @property
    def is_complete(self) -> bool:
        return self.cache.is_updated.get(self.layer, False)

    @property
    def states(self):
        layer = self.cache.cross_attention_cache.layers[self.layer]
        return layer.keys, layer.values

    def update(self, keys, values):
        self.cache.is_updated[self.layer] = True
        return self.cache.cross_attention_cache.update(keys, values, self.layer)


class MetroT5Encoder(MetroT5Stack):
    """The encoder stack, returning what Hugging Face expects of an encoder."""

    main_input_name = "input_ids"

    def __init__(self, config: MetroT5Config):
        super().__init__(config, is_decoder=False)

    @can_return_tuple
    def forward(  # type: ignore[override]  # fewer inputs than a decoder's
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Hidden states B,S,D of ``input_ids`` B,S; ``attention_mask`` B,S, nonzero = attend.

        ``positions`` B,M: hidden states B,M,D at these positions only.
        """
        output = super().forward(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            positions=positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return BaseModelOutput(output.last_hidden_state, output.hidden_states, output.attentions)


class MetroT5Decoder(MetroT5Stack):
    """The decoder stack, with caches of transformers for its keys and values."""

    main_input_name = "input_ids"

    def __init__(self, config: MetroT5Config):
        super().__init__(config, is_decoder=True)

    @can_return_tuple
    def forward(  # type: ignore[override]  # caches as transformers has them
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Hidden states B,T,D of ``input_ids`` B,T, which see ``encoder_hidden_states`` B,S,D.

        Masks: nonzero = attend. ``positions`` B,M: hidden states B,M,D at these positions only.
        """
        embeds = self.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        caches = {}
        if past_key_values is not None:
            written, past_length = None, past_key_values.get_seq_length()
            if past_key_values.is_compileable:
                layer = past_key_values.self_attention_cache.layers[0]
                caches["static_length"] = layer.max_cache_len
                written = torch.arange(embeds.shape[1], device=embeds.device) + past_length
            caches["past_length"] = past_length
            caches["layer_caches"] = [
                (
                    SelfAttentionCache(past_key_values, i, written),
                    CrossAttentionCache(past_key_values, i),
                )
                for i in range(len(self.block))
            ]
        output = super().forward(
            None,
            attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            inputs_embeds=embeds,
            positions=positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **caches,
        )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=output.last_hidden_state,
            past_key_values=past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )


class MetroT5PreTrainedModel(PreTrainedModel):
    """Base of both models: configuration class, supported features, fresh weights."""

    config_class = MetroT5Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        initialize_weights(module, self.config.initializer_factor)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.shared = embedding
        for stack in (self.encoder, getattr(self, "decoder", None)):
            if stack is not None:
                stack.embed_tokens = embedding

    def encode(self, encoder_outputs: BaseModelOutput | tuple | None, **inputs) -> BaseModelOutput:
        """Return the encoder's output: what was given as such, or that of ``inputs``."""
        if encoder_outputs is None:
            return self.encoder(**inputs, return_dict=True)
        if isinstance(encoder_outputs, BaseModelOutput):
            return encoder_outputs
        return BaseModelOutput(*encoder_outputs)


class MetroT5EncoderModel(MetroT5PreTrainedModel):
    """The encoder alone; loads from the same folder as the whole model."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}
    _keys_to_ignore_on_load_unexpected = [r"decoder.*", r"lm_head.*"]

    def __init__(self, config: MetroT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = MetroT5Encoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """See :meth:`MetroT5Encoder.forward`."""
        return self.encoder(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            positions=positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )


class MetroT5ForConditionalGeneration(MetroT5PreTrainedModel, GenerationMixin):
    """Encoder, decoder and the tied output projection."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }

    def __init__(self, config: MetroT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = MetroT5Encoder(config)
        self.decoder = MetroT5Decoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality=None) -> MetroT5Encoder:
        return self.encoder

    def get_decoder(self) -> MetroT5Decoder:
        return self.decoder

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, projection: nn.Linear) -> None:
        self.lm_head = projection

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs) -> torch.Tensor | None:
        """No mask of pairs for caches of a fixed size: the decoder makes its own."""
        return attention_mask

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift labels right, ``decoder_start_token_id`` first; ignored ones (-100) are padding."""
        shifted = torch.roll(labels, 1, dims=-1)
        shifted[..., 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Logits B,T,V of the next token, and with ``labels`` B,T (-100 = ignored) the mean loss.

        ``attention_mask`` B,S and ``decoder_attention_mask``: nonzero = attend.
        ``decoder_input_ids`` default to the labels shifted right. ``num_items_in_batch`` (of the
        Trainer) replaces the number of labels as the loss's denominator.
        """
        if unknown := kwargs.keys() - {"num_items_in_batch", "cache_position"}:
            raise TypeError(f"forward() has no argument {', '.join(sorted(unknown))}")
        encoded = self.encode(
            encoder_outputs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)

        use_cache = self.config.use_cache if use_cache is None else use_cache
        checkpoints = self.decoder.block[0].gradient_checkpointing and self.training
        use_cache = use_cache and labels is None and not checkpoints
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_hidden_states=encoded[0],
            encoder_attention_mask=attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits_BTV = self.lm_head(decoded.last_hidden_state)
        loss = None
        if labels is not None:
            num_items = kwargs.get("num_items_in_batch")
            loss = F.cross_entropy(
                logits_BTV.float().flatten(0, 1),
                labels.to(logits_BTV.device).flatten(),
                reduction="mean" if num_items is None else "sum",
            )
            loss = loss if num_items is None else loss / num_items
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded[0],
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )


__all__ = ["MetroT5EncoderModel", "MetroT5ForConditionalGeneration", "MetroT5PreTrainedModel"]
