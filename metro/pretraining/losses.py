"""The METRO objective: masked language modelling, replaced token detection (RTD), corrective LM.

Gong et al. (ACL 2023), section 3.1 and equation 5, with M the masked and V the non-padding
positions::

    L = mean_M[-log p_aux(x_i)] + mean_M[w_i * -log p_main(x_i)] + 50 * mean_V[BCE(rtd_i, r_i)]

``w_i = sigmoid(rtd_i)``, detached, in the base configuration and 1 otherwise. As in the original,
the total is scaled by the number of positions of the LM loss, which fairseq divides by
(``sample_size``).

Shapes: B batch, T tokens, M masked positions per row (padded), N scored positions per row (the
masked ones, padded, or all T), D width, V vocabulary.
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
        ValueError: ``positions`` outside its valid values, or weighting without an RTD loss.
    """

    corrective_lm_weight: float = 1.0
    rtd_weight: float = 50.0
    positions: str = "lm"
    """Which losses are of masked positions only: ``none``, the LM loss (``lm``), or ``both``."""
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
    """Replaced positions where the main model's most likely token is the original."""
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
    """Whether the target is the most likely token."""


def token_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """Cross-entropy of a projection, without keeping logits; see :mod:`metro.ops`.

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


def metro_losses(
    objective: MetroObjective,
    *,
    mlm_loss: torch.Tensor,
    mlm_correct: torch.Tensor,
    is_masked: torch.Tensor,
    lm: TokenLoss,
    lm_is_scored: torch.Tensor,
    lm_is_replaced: torch.Tensor,
    lm_rtd_logits: torch.Tensor | None,
    rtd_logits: torch.Tensor | None,
    rtd_is_scored: torch.Tensor,
    is_replaced: torch.Tensor,
    is_token: torch.Tensor,
) -> MetroLosses:
    """All losses and counts of one batch.

    Args:
        objective: weights and variants.
        mlm_loss, mlm_correct, is_masked: B,M of the auxiliary model's positions; those that only
            fill up M have ``is_masked`` False.
        lm, lm_is_scored, lm_is_replaced, lm_rtd_logits: B,N of the main model's positions.
        rtd_logits, rtd_is_scored, is_replaced, is_token: B,T of all positions.
    """
    zero = lm.loss.new_zeros((), dtype=torch.float32)
    mlm = mlm_loss.where(is_masked, zero).sum()
    is_unreplaced = is_token & ~is_replaced
    num_masked, num_tokens, num_rtd = is_masked.sum(), is_token.sum(), rtd_is_scored.sum()

    if objective.rtd_weight > 0:
        rtd_logits = rtd_logits.float()
        rtd = F.binary_cross_entropy_with_logits(rtd_logits, is_replaced.float(), reduction="none")
        rtd = rtd.where(rtd_is_scored, zero).sum()
        predicted = rtd_logits >= 0
        rtd_replaced, rtd_unreplaced = (
            (predicted & is_replaced).sum(),
            (~predicted & is_unreplaced).sum(),
        )
    else:
        rtd, rtd_replaced, rtd_unreplaced = zero, num_tokens * 0, num_tokens * 0

    lm_loss, lm_nll = lm.loss.where(lm_is_scored, zero), lm.nll.where(lm_is_scored, zero)
    mean_weight = 1.0
    if objective.weighted_lm:
        weights = lm_rtd_logits.detach().float().sigmoid()
        lm_loss, lm_nll = lm_loss * weights, lm_nll * weights
        if objective.positions == "none":
            mean_weight = weights.mean()  # over padding too, as the original does
        else:
            mean_weight = weights.where(lm_is_scored, zero).sum() / lm_is_scored.sum().clamp(min=1)
        mean_weight = mean_weight.where(mean_weight > 0, 1.0)  # nothing was scored
    lm_loss, lm_nll = lm_loss.sum(), lm_nll.sum() / mean_weight
    if objective.divide_by_mean_weight:
        lm_loss = lm_loss / mean_weight
    if objective.rtd_only:
        lm_loss = lm_loss * 0.0

    sample_size = lm_is_scored.sum()
    total = (
        mlm / num_masked.clamp(min=1) * sample_size
        + objective.corrective_lm_weight * lm_loss
        + objective.rtd_weight * rtd / num_rtd.clamp(min=1) * sample_size
    )
    with torch.no_grad():
        lm_is_correct = lm.correct & lm_is_scored
        lm_is_unreplaced = lm_is_scored & ~lm_is_replaced
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
            mlm_num_correct=(mlm_correct & is_masked).sum(),
            replaced_num_correct=(lm_is_correct & lm_is_replaced).sum(),
            num_replaced=is_replaced.sum(),
            unreplaced_num_correct=(lm_is_correct & lm_is_unreplaced).sum(),
            num_unreplaced=is_unreplaced.sum(),
            num_unreplaced_scored=lm_is_unreplaced.sum(),
            rtd_replaced_num_correct=rtd_replaced,
            rtd_unreplaced_num_correct=rtd_unreplaced,
        )
