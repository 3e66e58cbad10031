"""FLIPPED: a likelihood term under the right label, an unlikelihood term under a wrong one.

Ye et al. (ICLR 2023), equations 2 and 3:

    L = mean_t -log P(I_t | x, y, I_<t) + lambda * mean_t -log(1 - P(I_t | x, y', I_<t) + 0.01)

I is the instruction, x the input, y its label and y' another option. All tokens of the instruction
count: sentinels, text and the end token; padding does not. As published, the 0.01 makes the second
term slightly negative where P is 0.

Letters: B batch, S encoder tokens, T instruction tokens, D width, N = B * T, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from metro.models.projection import ProjectionInput, projection_input, unwrap
from metro.ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from metro.utils.messages import UserError

EPSILON = 0.01
UNLIKELIHOOD_WEIGHT = 3.0


class FlippedLoss(NamedTuple):
    """The loss of a batch and its parts."""

    total: torch.Tensor
    """likelihood + unlikelihood_weight * unlikelihood; the only one with a gradient."""
    likelihood: torch.Tensor
    """Mean of -log P(I_t | x, y)."""
    unlikelihood: torch.Tensor
    """Mean of -log(1 - P(I_t | x, y') + 0.01)."""
    right_log_prob_B: torch.Tensor
    """log P(I | x, y) of each example, without gradient."""
    wrong_log_prob_B: torch.Tensor
    """log P(I | x, y') of each example, without gradient."""


def flipped_loss(
    model: nn.Module,
    right_ids: torch.Tensor,
    wrong_ids: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    pad_token_id: int,
    unlikelihood_weight: float = UNLIKELIHOOD_WEIGHT,
    num_items: torch.Tensor | float | None = None,
    mean: str = "tokens",
) -> FlippedLoss:
    """The FLIPPED loss; both encoder inputs go through the model in one batch.

    Args:
        model: any sequence-to-sequence model of Hugging Face.
        right_ids: B,S encoder ids with the right label, padded with `pad_token_id`.
        wrong_ids: B,S' encoder ids with a wrong label.
        target_ids: B,T ids of the instruction, end token included.
        pad_token_id: what is padding in all three.
        unlikelihood_weight: lambda; 0 leaves the second term out of the loss, not out of the log.
        num_items: divide by this many tokens (or examples) instead of those of this batch, for a
            batch that is one part of a larger one.
        mean: "tokens" weighs every token of the batch alike, "examples" every example, as the
            published training did with one example per micro-batch.
    """
    check_unlikelihood_weight(unlikelihood_weight)
    num_examples = len(target_ids)
    encoder_ids = stack_padded(right_ids, wrong_ids, pad_token_id)
    projected = projection_input(
        model,
        input_ids=encoder_ids,
        attention_mask=encoder_ids.ne(pad_token_id),
        decoder_input_ids=shift_right(target_ids, start_token(model)).repeat(2, 1),
    )
    is_target_BT = target_ids.ne(pad_token_id)
    nll = token_losses(projected, target_ids.repeat(2, 1), pad_token_id).loss
    right_BT, wrong_BT = nll[:num_examples], nll[num_examples:]
    weight_BT = mean_weights(is_target_BT.to(nll.dtype), mean, num_items)
    likelihood = (right_BT * weight_BT).sum()
    unlikelihood_BT = unlikelihood(wrong_BT)
    if unlikelihood_weight == 0:  # for the log only
        unlikelihood_BT = unlikelihood_BT.detach()
    unlikelihood_mean = (unlikelihood_BT * weight_BT).sum()
    return FlippedLoss(
        likelihood + unlikelihood_weight * unlikelihood_mean,
        likelihood.detach(),
        unlikelihood_mean.detach(),
        -right_BT.detach().sum(1),
        -wrong_BT.detach().sum(1),
    )


def unlikelihood(nll: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """`-log(1 - p + epsilon)` of `nll = -log p`, in its precision; finite for every p, 1 too."""
    return -torch.log(epsilon - torch.expm1(-nll))


def token_losses(
    projected: ProjectionInput,
    target_ids_BT: torch.Tensor,
    pad_token_id: int,
    label_smoothing: float = 0.0,
) -> LinearCrossEntropy:
    """`-log P(target)` B,T in fp32, 0 at padding, without logits of all positions in memory."""
    hidden_BTD, weight_VD, bias_V = projected
    return linear_cross_entropy(
        hidden_BTD,
        weight_VD,
        target_ids_BT,
        bias_V=bias_V,
        ignore_index=pad_token_id,
        label_smoothing=label_smoothing,
    )


def mean_weights(
    is_target_BT: torch.Tensor, mean: str, num_items: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Weights B,T whose sum with a value per token is its mean over tokens or over examples.

    `is_target_BT` is 1 at target tokens and 0 at padding, in a floating-point type.
    """
    if mean == "tokens":
        return is_target_BT / (is_target_BT.sum() if num_items is None else num_items)
    if mean != "examples":
        raise UserError(f"mean is {mean!r}; use 'tokens' or 'examples'")
    total = len(is_target_BT) if num_items is None else num_items
    return is_target_BT / is_target_BT.sum(1, keepdim=True).clamp(min=1) / total


def shift_right(target_ids_BT: torch.Tensor, start: int) -> torch.Tensor:
    """Decoder input for a target: `start`, then everything but the last token."""
    shifted = target_ids_BT.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted


def start_token(model: nn.Module) -> int:
    """The decoder's first input."""
    config = unwrap(model).config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise UserError(
            f"the configuration of {type(unwrap(model)).__name__} has no decoder_start_token_id; "
            "set it in its config.json"
        )
    return start


def stack_padded(first_BS: torch.Tensor, second_BS: torch.Tensor, pad: int) -> torch.Tensor:
    """Both batches under each other, padded to the longer one's width."""
    width = max(first_BS.shape[1], second_BS.shape[1])
    return torch.cat(
        [F.pad(ids, (0, width - ids.shape[1]), value=pad) for ids in (first_BS, second_BS)]
    )


def check_unlikelihood_weight(weight: float) -> None:
    """Refuse a lambda that would reward the wrong label, or NaN."""
    if not 0 <= weight < float("inf"):
        raise UserError(f"unlikelihood_weight (lambda) is {weight}; use 0 or more (published: 3)")
