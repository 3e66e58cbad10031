"""METRO-T5 as a classifier of sequences, finetuned on labels; in the manner of T5's.

Encoder and decoder read the same text. A head of two layers makes the logits of the decoder's
hidden state that predicts the text's last end symbol. Weights but the head's are those of a
METRO-T5 folder.

Shapes: B batch, S source tokens, D d_model, C labels (``config.num_labels``).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqSequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_metro_t5 import MetroT5Config
from .modeling_metro_t5 import MetroT5Decoder, MetroT5Encoder, MetroT5PreTrainedModel


class ClassificationHead(nn.Module):
    """D -> D -> C, tanh between; dropout ``config.classifier_dropout``, 0 if there is none."""

    def __init__(self, config: MetroT5Config):
        super().__init__()
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.0))
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(hidden_BD)))))


class MetroT5ForSequenceClassification(MetroT5PreTrainedModel):
    """Encoder, decoder and a classification head."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    _keys_to_ignore_on_load_unexpected = [r"lm_head.*"]

    def __init__(self, config: MetroT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = MetroT5Encoder(config)
        self.decoder = MetroT5Decoder(config)
        self.classification_head = ClassificationHead(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ClassificationHead):
            for linear in (module.dense, module.out_proj):
                std = self.config.initializer_factor * self.config.d_model**-0.5
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqSequenceClassifierOutput:
        """Logits B,C of texts ``input_ids`` B,S, and with ``labels`` the mean loss.

        ``labels``: B classes, B,C zeros and ones of several that hold at once, or B numbers where
        ``num_labels`` is 1 (``config.problem_type``, by default as the labels look).
        ``attention_mask`` B,S: nonzero = attend.

        Raises:
            ValueError: a text without an end symbol; ``inputs_embeds``, which do not tell where
                it is.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("MetroT5ForSequenceClassification takes input_ids, not inputs_embeds")
        is_end = input_ids == self.config.eos_token_id
        if not torch.compiler.is_compiling() and not bool(is_end.any(-1).all()):
            raise ValueError("every text needs an end symbol, which the tokenizer writes")
        encoded = self.encode(
            encoder_outputs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        decoder_mask = attention_mask
        if attention_mask is not None:
            decoder_mask = F.pad(attention_mask[:, :-1], (1, 0), value=1)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        decoded = self.decoder(
            F.pad(input_ids[:, :-1], (1, 0), value=self.config.decoder_start_token_id),
            decoder_mask,
            encoder_hidden_states=encoded[0],
            encoder_attention_mask=attention_mask,
            positions=(is_end * positions).argmax(-1, keepdim=True),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits_BC = self.classification_head(decoded.last_hidden_state[:, 0])
        return Seq2SeqSequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits_BC, labels.to(logits_BC.device)),
            logits=logits_BC,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded[0],
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def _loss(self, logits_BC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kind, logits_BC = self.config.problem_type, logits_BC.float()
        if kind is None:
            if self.config.num_labels == 1:
                kind = "regression"
            elif labels.is_floating_point():
                kind = "multi_label_classification"
            else:
                kind = "single_label_classification"
        if kind == "regression":
            return F.mse_loss(logits_BC.view_as(labels), labels.float())
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits_BC, labels.float())
        return F.cross_entropy(logits_BC, labels.flatten())


__all__ = ["MetroT5ForSequenceClassification"]
