"""Losses of prompt finetuning, without logits of the whole batch in memory.

With encoder input x, target y, lambda the unlikelihood weight, and means over the target's tokens
t (padding excluded, the end token included):

direct, channel
    mean_t -log P(y_t | x, y_<t)
direct+ul
    mean_t -log P(y_t | x, y_<t) + lambda * mean_t -log(1 - P(y'_t | x, y'_<t) + 0.01)
    where y' is a wrong label
FLIPPED (Ye et al., ICLR 2023, equations 2 and 3)
    mean_t -log P(y_t | x, y_<t) + lambda * mean_t -log(1 - P(y_t | x', y_<t) + 0.01)
    where y is the instruction, x the input with its label and x' the input with a wrong label

As published, the 0.01 makes the second term slightly negative where P is 0.

Shapes: B batch, S encoder tokens, T target tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from metro.models.projection import (
    ProjectionInput,
    at_projection,
    start_token,
    unwrap,
    with_states,
)
from metro.ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from metro.utils.messages import UserError

EPSILON = 0.01
UNLIKELIHOOD_WEIGHT = 3.0


class LossOptions(NamedTuple):
    """Settings of the loss."""

    objective: str
    """See :mod:`metro.finetuning.objectives`."""
    pad_token_id: int
    """Padding of all ids."""
    mean: str = "tokens"
    """"tokens" weights every token of a batch equally, "examples" every example, as the published
    training did with one example per micro-batch."""
    unlikelihood_weight: float = UNLIKELIHOOD_WEIGHT
    """Lambda; 0 excludes the second term from the loss, not from the log."""
    label_smoothing: float = 0.0
    """Of direct and channel."""


class BatchLoss(NamedTuple):
    """Loss of a batch and the values logged with it."""

    total: torch.Tensor
    """Scalar with gradient."""
    sums: dict[str, torch.Tensor]
    """Sums over examples or tokens, without gradient; "examples" and "tokens" are their numbers."""


class UnlikelihoodLoss(NamedTuple):
    """Loss of a batch with right and wrong labels."""

    total: torch.Tensor
    """likelihood + unlikelihood_weight * unlikelihood; the only field with a gradient."""
    likelihood: torch.Tensor
    """First mean of the formula."""
    unlikelihood: torch.Tensor
    """Second mean of the formula, without lambda."""
    right_log_prob_B: torch.Tensor
    """log P(target | encoder input) of each example with its right label."""
    wrong_log_prob_B: torch.Tensor
    """The same with the wrong label."""


def token_losses(
    projected: ProjectionInput,
    target_ids_BT: torch.Tensor,
    pad_token_id: int,
    label_smoothing: float = 0.0,
) -> LinearCrossEntropy:
    """Compute `-log P(target)` (B, T) in fp32, 0 at padding."""
    return linear_cross_entropy(
        projected.hidden_BTD,
        projected.weight_VD,
        target_ids_BT,
        bias_V=projected.bias_V,
        ignore_index=pad_token_id,
        label_smoothing=label_smoothing,
    )


def unlikelihood(nll: torch.Tensor) -> torch.Tensor:
    """Compute `-log(1 - p + EPSILON)` of `nll = -log p`, finite for every p including 1."""
    return -torch.log(EPSILON - torch.expm1(-nll))


def mean_weights(
    is_target_BT: torch.Tensor, mean: str, num_items: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Compute weights (B, T) such that the weighted sum of a value per token is its mean.

    Args:
        is_target_BT: floating-point, 1 at target tokens and 0 at padding.
        mean: "tokens" or "examples".
        num_items: divisor in place of this batch's number of tokens (or examples).
    """
    if mean == "tokens":
        return is_target_BT / (is_target_BT.sum() if num_items is None else num_items)
    if mean != "examples":
        raise UserError(f"mean is {mean!r}; use 'tokens' or 'examples'")
    total = len(is_target_BT) if num_items is None else num_items
    return is_target_BT / is_target_BT.sum(1, keepdim=True).clamp(min=1) / total


def shift_targets(target_ids_BT: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """Make the decoder's input of a padded target: `start`, then all but the last token."""
    shifted = target_ids_BT.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(target_ids_BT.eq(pad), pad)


def stack_padded(first_BS: torch.Tensor, second_BS: torch.Tensor, pad: int) -> torch.Tensor:
    """Concatenate two batches along B, padded to the wider one."""
    width = max(first_BS.shape[1], second_BS.shape[1])
    return torch.cat(
        [F.pad(ids, (0, width - ids.shape[1]), value=pad) for ids in (first_BS, second_BS)]
    )


def check_unlikelihood_weight(weight: float) -> None:
    """Refuse a lambda that would reward the wrong label, or NaN."""
    if not 0 <= weight < float("inf"):
        raise UserError(f"unlikelihood_weight (lambda) is {weight}; use 0 or more (published: 3)")


def batch_loss(
    model: nn.Module,
    options: LossOptions,
    source_ids: torch.Tensor,
    target_ids: torch.Tensor,
    wrong_ids: torch.Tensor | None = None,
    *,
    num_items: torch.Tensor | float | None = None,
) -> BatchLoss:
    """Compute the loss of one (micro-)batch under any objective.

    Args:
        model: any sequence-to-sequence model of Hugging Face.
        options: objective and settings.
        source_ids: (B, S) encoder ids, padded.
        target_ids: (B, T) target ids, end token included.
        wrong_ids: what holds a wrong label: encoder ids (B, S') for flipped, target ids (B, T') for
            direct+ul.
        num_items: tokens (or examples, see `options.mean`) that the sum is divided by, where this
            batch is one part of a larger one.
    """
    pad, is_target = options.pad_token_id, target_ids.ne(options.pad_token_id)
    sums = {"tokens": is_target.sum().float(), "examples": is_target.any(1).sum().float()}
    if options.objective in ("flipped", "direct+ul"):
        assert wrong_ids is not None
        loss = unlikelihood_loss(
            model, options, source_ids, target_ids, wrong_ids, num_items=num_items
        )
        items = sums[options.mean] if num_items is None else num_items
        sums |= {
            "likelihood": loss.likelihood * items,
            "unlikelihood": loss.unlikelihood * items,
            "right_log_prob": loss.right_log_prob_B.sum(),
            "wrong_log_prob": loss.wrong_log_prob_B.sum(),
            "right_prob": loss.right_log_prob_B.exp().sum(),
            "wrong_prob": loss.wrong_log_prob_B.exp().sum(),
            "ranked_right": (loss.right_log_prob_B > loss.wrong_log_prob_B).float().sum(),
        }
        return BatchLoss(loss.total, sums)
    loss_BT, correct_BT = at_projection(
        model,
        lambda projected: token_losses(projected, target_ids, pad, options.label_smoothing),
        input_ids=source_ids,
        attention_mask=source_ids.ne(pad),
        decoder_input_ids=shift_targets(target_ids, start_token(model), pad),
    )
    weight_BT = mean_weights(is_target.to(loss_BT.dtype), options.mean, num_items)
    exact = (correct_BT | ~is_target).all(1).float()
    sums |= {"nll": loss_BT.detach().sum(), "exact": exact.sum()}
    return BatchLoss((loss_BT * weight_BT).sum(), sums)


@contextlib.contextmanager
def encoding_equal_halves(model: nn.Module):
    """Let the encoder compute the first half of its batch, and repeat it for the second.

    By hooks, as sharded weights are there in the call of the whole model alone.
    """

    def half(value):
        return value.chunk(2)[0] if torch.is_tensor(value) else value

    def take_half(_, args, kwargs):
        return tuple(map(half, args)), {name: half(value) for name, value in kwargs.items()}

    def repeat(_, args, encoded):
        return with_states(encoded, encoded[0].repeat(2, 1, 1))

    encoder = unwrap(model).get_encoder()
    hooks = (
        encoder.register_forward_pre_hook(take_half, with_kwargs=True),
        encoder.register_forward_hook(repeat),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unlikelihood_loss(
    model: nn.Module,
    options: LossOptions,
    source_ids: torch.Tensor,
    target_ids: torch.Tensor,
    wrong_ids: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None = None,
) -> UnlikelihoodLoss:
    """Compute the loss of flipped or direct+ul; arguments as for :func:`batch_loss`.

    Right and wrong labels go through the model in one batch; direct+ul encodes x once.
    """
    check_unlikelihood_weight(options.unlikelihood_weight)
    pad = options.pad_token_id
    if options.objective == "flipped":
        sources, targets = stack_padded(source_ids, wrong_ids, pad), target_ids.repeat(2, 1)
    else:
        sources, targets = source_ids.repeat(2, 1), stack_padded(target_ids, wrong_ids, pad)
    with contextlib.ExitStack() as stack:
        if options.objective != "flipped":
            stack.enter_context(encoding_equal_halves(model))
        nll = at_projection(
            model,
            lambda projected: token_losses(projected, targets, pad),
            input_ids=sources,
            attention_mask=sources.ne(pad),
            decoder_input_ids=shift_targets(targets, start_token(model), pad),
        ).loss
    right_BT, wrong_BT = nll.chunk(2)
    is_right, is_wrong = targets.ne(pad).to(nll.dtype).chunk(2)
    likelihood = (right_BT * mean_weights(is_right, options.mean, num_items)).sum()
    if num_items is not None and options.mean == "tokens":
        # The wrong tokens of a part of a batch count as much as its right ones.
        num_items = num_items * is_wrong.sum() / is_right.sum()
    unlikelihood_BT = unlikelihood(wrong_BT)
    if options.unlikelihood_weight == 0:  # for the log only
        unlikelihood_BT = unlikelihood_BT.detach()
    unlikely = (unlikelihood_BT * mean_weights(is_wrong, options.mean, num_items)).sum()
    return UnlikelihoodLoss(
        likelihood + options.unlikelihood_weight * unlikely,
        likelihood.detach(),
        unlikely.detach(),
        -right_BT.detach().sum(1),
        -wrong_BT.detach().sum(1),
    )
