"""The METRO objective: masked language modelling, replaced token detection (RTD), corrective LM.

Gong et al. (ACL 2023), section 3.1 and equation 5, means over the positions that are ``masked`` and
over those that are a ``token``, not padding::

    L = mean_masked[-log p_aux(x_i)]               # masked language modelling, auxiliary model
        + mean_masked[w_i * -log p_main(x_i)]      # corrective LM, main model's decoder
        + 50 * mean_token[BCE(rtd_i, r_i)]         # RTD, main model's encoder; r_i: replaced

``w_i = sigmoid(rtd_i)``, detached, in the base configuration and 1 otherwise. As in the original,
the total is scaled by the number of positions of the LM loss, which fairseq divides by
(``sample_size``).

Shapes: B batch, T tokens, M masked positions per sequence (padded), N positions of the corrective
LM per sequence (the M or all T), D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from metro.ops.linear_cross_entropy import linear_cross_entropy
from metro.utils.messages import UserError

SCORED_POSITIONS = ("none", "lm", "both")


@dataclass(frozen=True)
class MetroObjective:
    """Weights and variants of the objective; the defaults are those of base++ and large++.

    Raises:
        UserError: ``positions`` outside its valid values, or weighting without an RTD loss.
    """

    corrective_lm_weight: float = 1.0
    rtd_weight: float = 50.0
    positions: str = "lm"
    """Losses of masked positions only: ``none``, the LM loss (``lm``), or ``both``."""
    label_smoothing: float = 0.0
    weighted_lm: bool = False
    """Weight each token's LM loss by the RTD head's probability that it was replaced."""
    divide_by_mean_weight: bool = False
    """Divide the weighted LM loss by the mean weight."""
    rtd_only: bool = False
    """Train without the LM loss; it is still computed and logged."""

    def __post_init__(self):
        if self.positions not in SCORED_POSITIONS:
            raise UserError(
                f"masked_positions_only is {self.positions!r}; "
                f"use one of {', '.join(SCORED_POSITIONS)}"
            )
        if self.weighted_lm and self.rtd_weight <= 0:
            raise UserError(
                "weighted_lm_loss needs the RTD head's probabilities: set rtd_loss_weight above 0"
            )


class MetroLosses(NamedTuple):
    """Sums over one batch, 0-dimensional tensors on its device; losses in natural units."""

    total: torch.Tensor
    """The objective times ``sample_size``; the only entry with a gradient."""
    sample_size: torch.Tensor
    """Positions of the LM loss: the masked ones, or all that are not padding."""
    mlm_loss: torch.Tensor
    """Cross-entropy of the auxiliary model at masked positions."""
    corrective_lm_loss: torch.Tensor
    """Cross-entropy of the main model, weighted and smoothed as the objective says."""
    corrective_lm_nll: torch.Tensor
    """The same without smoothing, and with the weights divided by their mean."""
    rtd_loss: torch.Tensor
    """Binary cross-entropy of replaced token detection."""
    num_masked: torch.Tensor
    num_rtd: torch.Tensor
    """Positions of the RTD loss."""
    num_tokens: torch.Tensor
    """Positions that are not padding."""
    mlm_num_correct: torch.Tensor
    replaced_num_correct: torch.Tensor
    """Replaced positions where the main model's most probable token is the original."""
    num_replaced: torch.Tensor
    unreplaced_num_correct: torch.Tensor
    """As ``replaced_num_correct``, over the unreplaced positions that were scored."""
    num_unreplaced: torch.Tensor
    num_unreplaced_scored: torch.Tensor
    """Unreplaced positions that were projected to the vocabulary: masked ones, unless all are."""
    rtd_replaced_num_correct: torch.Tensor
    rtd_unreplaced_num_correct: torch.Tensor


class TokenLoss(NamedTuple):
    """Cross-entropy of some positions, not reduced; 0 and False at those without a target."""

    loss: torch.Tensor
    """Smoothed as asked for."""
    nll: torch.Tensor
    """Minus the log-probability of the target."""
    correct: torch.Tensor
    """True where the target is the most probable token."""


def token_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """Compute the cross-entropy of a projection, without keeping logits; see :mod:`metro.ops`.

    Args:
        hidden: (..., D).
        weight: V,D.
        targets: (...) token ids, -100 where there is none.
        label_smoothing: with ``s = e / (V - 1)`` the loss is ``(1 - e - s) * nll + s * sum_v
            -log p_v``.
    """
    nll, correct = linear_cross_entropy(hidden, weight, targets)
    if not label_smoothing:
        return TokenLoss(nll, nll, correct)
    smoothed = linear_cross_entropy(hidden, weight, targets, label_smoothing=label_smoothing)
    return TokenLoss(smoothed.loss, nll.detach(), correct)


class T5Losses(NamedTuple):
    """Sums of span corruption over one batch, 0-dimensional tensors on its device."""

    total: torch.Tensor
    """Cross-entropy, smoothed as asked for; the only entry with a gradient."""
    sample_size: torch.Tensor
    """Target tokens."""
    nll: torch.Tensor
    """The same without smoothing."""
    num_correct: torch.Tensor
    """Positions where the most probable token is the target."""


class AuxiliaryPositions(NamedTuple):
    """The auxiliary model's positions, B,M."""

    loss: torch.Tensor
    correct: torch.Tensor
    """True where the original is the most probable token."""
    is_masked: torch.Tensor
    """False at those that only fill up M."""


class ScoredPositions(NamedTuple):
    """The positions of the corrective LM, B,N."""

    lm: TokenLoss
    is_scored: torch.Tensor
    """False at those that have no LM loss."""
    is_replaced: torch.Tensor
    rtd_logits: torch.Tensor | None
    """The same as those of :class:`AllPositions`; ``None`` without an RTD head."""


class AllPositions(NamedTuple):
    """Every position, B,T."""

    rtd_logits: torch.Tensor | None
    """Above 0 where the RTD head takes the token for replaced; ``None`` without one."""
    rtd_is_scored: torch.Tensor
    """True where there is an RTD loss."""
    is_replaced: torch.Tensor
    """True where the auxiliary model's sample is not the original."""
    is_token: torch.Tensor
    """False at padding."""


def metro_losses(
    objective: MetroObjective,
    auxiliary: AuxiliaryPositions,
    scored: ScoredPositions,
    everywhere: AllPositions,
) -> MetroLosses:
    """Compute all losses and counts of one batch.

    The RTD loss is that of ``objective.rtd_weight > 0``, over ``everywhere``.
    """
    lm, is_masked = scored.lm, auxiliary.is_masked
    is_replaced, is_token = everywhere.is_replaced, everywhere.is_token
    zero = lm.loss.new_zeros((), dtype=torch.float32)
    mlm = auxiliary.loss.where(is_masked, zero).sum()
    is_unreplaced = is_token & ~is_replaced
    num_masked, num_tokens = is_masked.sum(), is_token.sum()
    num_rtd = everywhere.rtd_is_scored.sum()

    if objective.rtd_weight > 0:
        assert everywhere.rtd_logits is not None, "rtd_weight is above 0 without an RTD head"
        rtd_logits = everywhere.rtd_logits.float()
        rtd = F.binary_cross_entropy_with_logits(rtd_logits, is_replaced.float(), reduction="none")
        rtd = rtd.where(everywhere.rtd_is_scored, zero).sum()
        predicted = rtd_logits >= 0
        rtd_replaced = (predicted & is_replaced).sum()
        rtd_unreplaced = (~predicted & is_unreplaced).sum()
    else:
        rtd, rtd_replaced, rtd_unreplaced = zero, num_tokens * 0, num_tokens * 0

    lm_loss, lm_nll = lm.loss.where(scored.is_scored, zero), lm.nll.where(scored.is_scored, zero)
    sample_size = scored.is_scored.sum()
    mean_weight = torch.ones_like(zero)
    if objective.weighted_lm:
        assert scored.rtd_logits is not None, "weighted_lm without an RTD head"
        weights = scored.rtd_logits.detach().float().sigmoid()
        lm_loss, lm_nll = lm_loss * weights, lm_nll * weights
        if objective.positions == "none":
            mean_weight = weights.mean()  # over padding too, as the original does
        else:
            mean_weight = weights.where(scored.is_scored, zero).sum() / sample_size.clamp(min=1)
        mean_weight = mean_weight.where(mean_weight > 0, 1.0)  # nothing was scored
    lm_loss, lm_nll = lm_loss.sum(), lm_nll.sum() / mean_weight
    if objective.divide_by_mean_weight:
        lm_loss = lm_loss / mean_weight
    if objective.rtd_only:
        lm_loss = lm_loss * 0.0

    total = (
        mlm / num_masked.clamp(min=1) * sample_size
        + objective.corrective_lm_weight * lm_loss
        + objective.rtd_weight * rtd / num_rtd.clamp(min=1) * sample_size
    )
    with torch.no_grad():
        lm_is_correct = lm.correct & scored.is_scored
        lm_is_unreplaced = scored.is_scored & ~scored.is_replaced
        return MetroLosses(
            total=total,
            sample_size=sample_size,
            mlm_loss=mlm.detach(),
            corrective_lm_loss=lm_loss.detach(),
            corrective_lm_nll=lm_nll.detach(),
            rtd_loss=rtd.detach(),
            num_masked=num_masked,
            num_rtd=num_rtd,
            num_tokens=num_tokens,
            mlm_num_correct=(auxiliary.correct & is_masked).sum(),
            replaced_num_correct=(lm_is_correct & scored.is_replaced).sum(),
            num_replaced=is_replaced.sum(),
            unreplaced_num_correct=(lm_is_correct & lm_is_unreplaced).sum(),
            num_unreplaced=is_unreplaced.sum(),
            num_unreplaced_scored=lm_is_unreplaced.sum(),
            rtd_replaced_num_correct=rtd_replaced,
            rtd_unreplaced_num_correct=rtd_unreplaced,
        )
