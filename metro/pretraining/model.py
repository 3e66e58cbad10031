"""The joint model of METRO pretraining: auxiliary model, main model and RTD head in one step.

Gong et al. (ACL 2023), section 3.1 and figure 1.

Shapes: B batch, T tokens, M masked positions of the fullest sequence, D d_model, V vocabulary.
"""

import torch
from torch import nn

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.pretraining.auxiliary import AuxiliaryModel, PredictionHead
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.losses import (
    AllPositions,
    AuxiliaryPositions,
    MetroLosses,
    MetroObjective,
    ScoredPositions,
    T5Losses,
    metro_losses,
    token_cross_entropy,
)

NO_TARGET = -100
"""The target of positions without loss."""


class MetroPretrainingModel(nn.Module):
    """``main``, ``auxiliary`` and ``rtd_head``.

    Args:
        config: sizes of the main model.
        pretraining: the auxiliary model and the RTD head.
    """

    def __init__(self, config: MetroT5Config, pretraining: MetroPretrainingConfig):
        super().__init__()
        self.config = config
        self.main = MetroT5ForConditionalGeneration(config)
        self.auxiliary = AuxiliaryModel(config, pretraining, self.main.encoder)
        self.rtd_head = build_rtd_head(config, pretraining.rtd_head)

    def forward(
        self,
        masked_ids: torch.Tensor,
        original_ids: torch.Tensor,
        is_masked: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        sampling_seed: torch.Tensor,
        objective: MetroObjective,
        corrupted_ids: torch.Tensor | None = None,
        max_masked: int | None = None,
        has_padding: bool | None = None,
    ) -> MetroLosses:
        """Run one METRO step: sample masked tokens, detect the replaced ones, correct them.

        Args:
            masked_ids: B,T int64, the sequence with masked positions, padded on the right.
            original_ids: B,T int64, the sequence as it was.
            is_masked: B,T bool, positions chosen for masking.
            decoder_input_ids: B,T int64, the original shifted right.
            sampling_seed: B int64, seeds each sequence's samples, whatever batch it is in.
            objective: what to compute.
            corrupted_ids: B,T int64, used instead of sampling where given.
            max_masked: at least the masked positions of every sequence.
            has_padding: False where no sequence is padded; attention then needs no mask. This and
                ``max_masked`` are computed when absent, which synchronises with the device.
        """
        is_token = original_ids.ne(self.config.pad_token_id)
        if has_padding is None:
            has_padding = not bool(is_token.all())
        mask = is_token if has_padding else None
        if max_masked is None:
            max_masked = int(is_masked.sum(1).max())
        # Masked positions in order, filled up with unmasked ones to M in each sequence.
        positions = is_masked.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        positions = positions[:, : max(max_masked, 1)]
        is_masked_BM = is_masked.gather(1, positions)

        mlm_targets = original_ids.gather(1, positions).masked_fill(~is_masked_BM, NO_TARGET)
        mlm = self.auxiliary.predict(masked_ids, mask, positions, mlm_targets, sampling_seed)
        if corrupted_ids is None:
            samples = mlm.samples.where(is_masked_BM, masked_ids.gather(1, positions))
            corrupted_ids = masked_ids.scatter(1, positions, samples)
        is_replaced = corrupted_ids.ne(original_ids) & is_token

        encoder_hidden = self.main.encoder(corrupted_ids, mask).last_hidden_state
        rtd_logits = None if self.rtd_head is None else self.rtd_head(encoder_hidden).squeeze(-1)
        lm_positions = None if objective.positions == "none" else positions
        decoder_hidden = self.main.decoder(
            decoder_input_ids,
            encoder_hidden_states=encoder_hidden,
            encoder_attention_mask=mask,
            positions=lm_positions,
        ).last_hidden_state

        def select(x_BT):
            return x_BT if lm_positions is None or x_BT is None else x_BT.gather(1, lm_positions)

        lm_is_scored = is_token if lm_positions is None else is_masked_BM
        lm = token_cross_entropy(
            decoder_hidden,
            self.main.lm_head.weight,
            select(original_ids).masked_fill(~lm_is_scored, NO_TARGET),
            objective.label_smoothing,
        )
        rtd_is_scored = is_masked if objective.positions == "both" else is_token
        return metro_losses(
            objective,
            AuxiliaryPositions(mlm.loss, mlm.correct, is_masked_BM),
            ScoredPositions(lm, lm_is_scored, select(is_replaced), select(rtd_logits)),
            AllPositions(rtd_logits, rtd_is_scored, is_replaced, is_token),
        )


class T5PretrainingModel(nn.Module):
    """``main`` alone, with the loss of span corruption."""

    def __init__(self, main: MetroT5ForConditionalGeneration):
        super().__init__()
        self.config, self.main = main.config, main

    def forward(
        self,
        input_ids: torch.Tensor,
        target_ids: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        label_smoothing: float = 0.0,
        has_padding: bool = True,
    ) -> T5Losses:
        """Compute the loss of a batch; see :class:`metro.data.collation.SpanBatch`."""
        pad = self.config.pad_token_id
        mask = input_ids.ne(pad) if has_padding else None
        encoded = self.main.encoder(input_ids, mask).last_hidden_state
        hidden_BTD = self.main.decoder(
            decoder_input_ids, encoder_hidden_states=encoded, encoder_attention_mask=mask
        ).last_hidden_state
        is_target = target_ids.ne(pad)
        targets = target_ids.masked_fill(~is_target, NO_TARGET)
        loss = token_cross_entropy(hidden_BTD, self.main.lm_head.weight, targets, label_smoothing)
        sums = (loss.nll.sum().detach(), (loss.correct & is_target).sum())
        return T5Losses(loss.loss.sum(), is_target.sum(), *sums)


def build_rtd_head(config: MetroT5Config, kind: str) -> nn.Module | None:
    """Build the RTD head: one logit per position, above 0 where it takes the token for replaced.

    ``simple`` is a linear layer, ``roberta`` a dense layer, activation and LayerNorm before it; the
    projection starts at zero. ``none`` is ``None``.
    """
    if kind == "none":
        return None
    if kind == "roberta":
        return PredictionHead(config, output_dim=1, tied=False)
    head = nn.Linear(config.d_model, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
