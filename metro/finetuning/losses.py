"""The loss of a batch under each objective, without logits of the whole batch in memory.

Letters: B batch, S encoder tokens, T target tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from metro.finetuning.flipped import (
    check_unlikelihood_weight,
    flipped_loss,
    mean_weights,
    shift_right,
    stack_padded,
    start_token,
    token_losses,
    unlikelihood,
)
from metro.models.projection import projection_input, unwrap


class LossOptions(NamedTuple):
    """What the loss needs beside the batch."""

    objective: str
    pad_token_id: int
    mean: str = "tokens"
    unlikelihood_weight: float = 3.0
    label_smoothing: float = 0.0


class BatchLoss(NamedTuple):
    """The loss of a batch and what is logged of it."""

    total: torch.Tensor
    sums: dict[str, torch.Tensor]
    """Without gradient, as sums over examples or tokens; the names say what of."""


def batch_loss(
    model: nn.Module,
    options: LossOptions,
    source_ids: torch.Tensor,
    target_ids: torch.Tensor,
    wrong_ids: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
) -> BatchLoss:
    """The loss of one (micro-)batch; all ids are padded with `options.pad_token_id`.

    `num_items` tokens (or examples, as `options.mean` says) of the whole batch divide the sum.
    """
    pad, is_target = options.pad_token_id, target_ids.ne(options.pad_token_id)
    counts = {"tokens": is_target.sum().float(), "examples": is_target.any(1).sum().float()}
    if options.objective == "flipped":
        loss = flipped_loss(
            model,
            source_ids,
            wrong_ids,
            target_ids,
            pad_token_id=pad,
            unlikelihood_weight=options.unlikelihood_weight,
            num_items=num_items,
            mean=options.mean,
        )
        ranked = (loss.right_log_prob_B > loss.wrong_log_prob_B).float()
        items = counts[options.mean] if num_items is None else num_items
        return BatchLoss(
            loss.total,
            {
                "likelihood": loss.likelihood * items,
                "unlikelihood": loss.unlikelihood * items,
                "right_log_prob": loss.right_log_prob_B.sum(),
                "wrong_log_prob": loss.wrong_log_prob_B.sum(),
                "right_prob": loss.right_log_prob_B.exp().sum(),
                "wrong_prob": loss.wrong_log_prob_B.exp().sum(),
                "ranked_right": ranked.sum(),
                **counts,
            },
        )
    if options.objective == "direct+ul":
        return _direct_unlikelihood(
            model, options, source_ids, target_ids, wrong_ids, num_items, counts
        )
    projected = projection_input(
        model,
        input_ids=source_ids,
        attention_mask=source_ids.ne(pad),
        decoder_input_ids=shift_right(target_ids, start_token(model)),
    )
    loss_BT, correct_BT = token_losses(projected, target_ids, pad, options.label_smoothing)
    weight_BT = mean_weights(is_target.to(loss_BT.dtype), options.mean, num_items)
    exact = (correct_BT | ~is_target).all(1).float()
    return BatchLoss(
        (loss_BT * weight_BT).sum(),
        {"nll": loss_BT.detach().sum(), "exact": exact.sum(), **counts},
    )


def _direct_unlikelihood(
    model, options: LossOptions, source_ids, target_ids, wrong_ids, num_items, counts
) -> BatchLoss:
    """-log P(y | x) and, on the tokens of a wrong label, -log(1 - P(y'_t | x) + 0.01).

    The prompt is encoded once. Each term is a mean over its own tokens (or over examples).
    """
    check_unlikelihood_weight(options.unlikelihood_weight)
    pad, num_examples = options.pad_token_id, len(target_ids)
    mask = source_ids.ne(pad)
    encoder = unwrap(model).get_encoder()
    hidden = encoder(input_ids=source_ids, attention_mask=mask)[0]
    targets = stack_padded(target_ids, wrong_ids, pad)
    projected = projection_input(
        model,
        encoder_outputs=BaseModelOutput(hidden.repeat(2, 1, 1)),
        attention_mask=mask.repeat(2, 1),
        decoder_input_ids=shift_right(targets, start_token(model)),
    )
    nll = token_losses(projected, targets, pad).loss
    is_token = targets.ne(pad).to(nll.dtype)
    right, wrong = nll[:num_examples], nll[num_examples:]
    weight = mean_weights(is_token[:num_examples], options.mean, num_items)
    # A batch that is part of a larger one has its share of the examples or right tokens; the wrong
    # tokens are weighed so that they count as many as those.
    wrong_weight = mean_weights(is_token[num_examples:], options.mean, None)
    share = weight.sum() / wrong_weight.sum()
    likelihood = (right * weight).sum()
    unlikely = (unlikelihood(wrong) * is_token[num_examples:] * wrong_weight).sum() * share
    ranked = (right.detach().sum(1) < wrong.detach().sum(1)).float()
    items = counts[options.mean] if num_items is None else num_items
    return BatchLoss(
        likelihood + options.unlikelihood_weight * unlikely,
        {
            "nll": right.detach().sum(),
            "unlikelihood": unlikely.detach() * items,
            "ranked_right": ranked.sum(),
            **counts,
        },
    )
