"""The objective on numbers one can check by hand."""

import math

import pytest
import torch

from metro.pretraining.losses import (
    AllPositions,
    AuxiliaryPositions,
    MetroObjective,
    ScoredPositions,
    metro_losses,
    token_cross_entropy,
)

LN2, LN4 = math.log(2), math.log(4)


def hand_losses(**objective):
    """One row of three tokens and one pad; tokens 0 and 1 are masked, token 0 was replaced.

    V = 4 with equal logits: every cross-entropy is ln 4. RTD logits are zero: every BCE is ln 2,
    and every weight 1/2. Equal logits make token 0 the prediction.
    """
    is_masked = torch.tensor([[True, True]])
    three = torch.tensor([[True, True, True, False]])
    positions = objective.get("positions", "lm")
    scored = three if positions == "none" else is_masked
    num_scored = scored.shape[1]
    is_replaced = torch.tensor([[True, False, False, False]])
    targets = torch.tensor([[0, 3, 0, 1]])
    two = torch.tensor([[True, True, False, False]])
    identity = torch.eye(4)  # hidden states are logits
    mlm = token_cross_entropy(torch.zeros(1, 2, 4), identity, targets[:, :2])
    lm_logits = torch.zeros(1, num_scored, 4, requires_grad=True)
    return metro_losses(
        MetroObjective(**objective),
        AuxiliaryPositions(mlm.loss, mlm.correct, is_masked),
        ScoredPositions(
            token_cross_entropy(lm_logits, identity, targets[:, :num_scored]),
            is_scored=scored,
            is_replaced=is_replaced[:, :num_scored],
            rtd_logits=torch.zeros(1, num_scored),
        ),
        AllPositions(
            rtd_logits=torch.zeros(1, 4, requires_grad=True),
            rtd_is_scored=two if positions == "both" else three,
            is_replaced=is_replaced,
            is_token=three,
        ),
    )


@pytest.mark.parametrize(
    "objective, want",
    [
        ({}, 2 * (LN4 + LN4 + 50 * LN2)),
        ({"weighted_lm": True}, 2 * (LN4 + LN4 / 2 + 50 * LN2)),
        ({"weighted_lm": True, "divide_by_mean_weight": True}, 2 * (LN4 + LN4 + 50 * LN2)),
        ({"positions": "none"}, 3 * (LN4 + LN4 + 50 * LN2)),
        ({"positions": "both"}, 2 * (LN4 + LN4 + 50 * LN2)),
        ({"rtd_only": True}, 2 * (LN4 + 50 * LN2)),
        ({"corrective_lm_weight": 0.5, "rtd_weight": 10.0}, 2 * (LN4 + LN4 / 2 + 10 * LN2)),
        ({"rtd_weight": 0.0}, 2 * (LN4 + LN4)),
    ],
)
def test_total_equals_the_formula(objective, want):
    assert float(hand_losses(**objective).total.detach()) == pytest.approx(want, rel=1e-6)


def test_counts_by_hand():
    losses = hand_losses()
    counts = {name: int(getattr(losses, name)) for name in losses._fields if "num" in name}
    assert counts == {
        "num_masked": 2,
        "num_rtd": 3,
        "num_tokens": 3,
        "mlm_num_correct": 1,
        "replaced_num_correct": 1,
        "num_replaced": 1,
        "unreplaced_num_correct": 0,
        "num_unreplaced": 2,
        "num_unreplaced_scored": 1,
        "rtd_replaced_num_correct": 1,
        "rtd_unreplaced_num_correct": 0,
    }
    assert int(losses.sample_size) == 2


def test_label_smoothing_equals_the_formula():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    log_probs = logits.log_softmax(-1)[0]
    share = 0.1 / 2
    want = -(1 - 0.1 - share) * log_probs[2] - share * log_probs.sum()
    losses = token_cross_entropy(logits, torch.eye(3), torch.tensor([2]), 0.1)
    torch.testing.assert_close(losses.loss[0], want)
    torch.testing.assert_close(losses.nll[0], -log_probs[2])


def test_weighting_without_rtd_is_refused():
    with pytest.raises(ValueError, match="rtd_loss_weight"):
        MetroObjective(rtd_weight=0.0, weighted_lm=True)
    with pytest.raises(ValueError, match="masked_positions_only is 'all'"):
        MetroObjective(positions="all")
