"""The auxiliary model of METRO: a small BERT that fills masked positions with its own samples.

Gong et al. (ACL 2023), section 3.1. It is called "generator" in the published registry and
checkpoints.

Shapes: B batch, T tokens, M masked positions per sequence (padded), D d_model, V vocabulary.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.layers_metro_t5 import MetroT5Stack
from metro.ops.linear_sample_cross_entropy import (
    LinearSampleCrossEntropy,
    linear_sample_cross_entropy,
)
from metro.pretraining.configuration import MetroPretrainingConfig

ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class PredictionHead(nn.Module):
    """``projection(LayerNorm(activation(dense(x))))``: head of BERT and ``roberta`` RTD head.

    Args:
        config: the main model's configuration (width, activation, epsilon).
        output_dim: width of the projection.
        tied: the projection's weight is passed to ``forward`` instead of owned.
    """

    def __init__(self, config: MetroT5Config, output_dim: int, tied: bool):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.activation = ACTIVATIONS[config.feed_forward_proj]
        if not tied:
            self.weight = nn.Parameter(torch.zeros(output_dim, config.d_model))
        self.bias = nn.Parameter(torch.zeros(output_dim))

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what is projected to the vocabulary, or to the logit."""
        return self.layer_norm(self.activation(self.dense(hidden)))

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight if weight is None else weight
        return F.linear(self.features(hidden), weight, self.bias)


class AuxiliaryModel(nn.Module):
    """Encoder of the main model's width with a language modelling head tied to its embedding.

    Args:
        config: the main model's configuration.
        pretraining: depth, dropout and what is shared.
        main_encoder: the main encoder, whose embeddings ``pretraining.share`` may take.
    """

    def __init__(
        self, config: MetroT5Config, pretraining: MetroPretrainingConfig, main_encoder: MetroT5Stack
    ):
        super().__init__()
        config = copy.deepcopy(config)
        config.num_layers = pretraining.auxiliary_layers
        if pretraining.zero_dropout:
            config.dropout_rate = config.attention_dropout_rate = 0.0
            config.activation_dropout_rate = 0.0
        shared = pretraining.share.split("_")
        self.sample_mode = pretraining.sample_mode
        self.encoder = MetroT5Stack(config, is_decoder=False)
        self.lm_head = PredictionHead(config, config.vocab_size, tied=True)
        self.initialize_weights()
        if "token" in shared:
            self.encoder.embed_tokens = main_encoder.embed_tokens
        if "pos" in shared:
            self.encoder.pos_embed = main_encoder.pos_embed
        if "norm" in shared:
            self.encoder.first_layer_norm = main_encoder.first_layer_norm

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise as BERT: normal with standard deviation 0.02; biases and padding zero."""
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])

    def forward(
        self, masked_ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return logits B,M,V at ``positions`` B,M of ``masked_ids`` B,T.

        ``mask`` is B,T, True = attend.
        """
        hidden_BMD = self.encoder(masked_ids, mask, positions=positions).last_hidden_state
        return self.lm_head(hidden_BMD, self.encoder.embed_tokens.weight)

    def predict(
        self,
        masked_ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        target_ids: torch.Tensor,
        seeds: torch.Tensor,
    ) -> LinearSampleCrossEntropy:
        """Compute loss and a sample at ``positions``, without keeping logits.

        Samples come from the training pass or, with ``sample_mode`` ``eval``, from one without
        dropout; they are a function of the sequence's seed and the position.

        Args:
            masked_ids, mask, positions: as for :meth:`forward`.
            target_ids: B,M; -100 where there is no loss.
            seeds: B int64.
        """

        def head():
            hidden = self.encoder(masked_ids, mask, positions=positions).last_hidden_state
            return linear_sample_cross_entropy(
                self.lm_head.features(hidden),
                self.encoder.embed_tokens.weight,
                target_ids,
                seeds.unsqueeze(1),
                positions,
                bias_V=self.lm_head.bias,
            )

        predicted = head()
        if self.sample_mode == "eval" and self.training:
            self.eval()
            with torch.no_grad():
                predicted = predicted._replace(samples=head().samples)
            self.train()
        return predicted
