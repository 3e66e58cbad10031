"""`batch_loss` of direct, channel and direct+ul against plain full-logit computations."""

import pytest
import torch
import torch.nn.functional as F

from metro.finetuning.losses import LossOptions, batch_loss
from tests.finetuning.conftest import small_model
from tests.finetuning.test_flipped import random_batch


def log_probs(model, source, target):
    start = torch.full((len(target), 1), model.config.decoder_start_token_id)
    logits = model(
        input_ids=source,
        attention_mask=source.ne(1),
        decoder_input_ids=torch.cat([start, target[:, :-1]], 1),
    ).logits
    return logits.double().log_softmax(-1)


def of_target(log_p, target):
    return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def average(values, is_token, mean):
    if mean == "tokens":
        return values[is_token].mean()
    rows = [row[real].mean() for row, real in zip(values, is_token, strict=True)]
    return sum(rows) / len(rows)


def check(model, options, batch, want):
    loss = batch_loss(model, options, *batch)
    loss.total.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want.backward()
    assert float(loss.total.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    return loss


@pytest.mark.parametrize("kind", ["metro", "t5", "bart"])
@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_direct_is_the_mean_negative_log_likelihood(kind, mean):
    model = small_model(kind)
    source, _, target = random_batch()
    log_p = log_probs(model, source, target)
    want = average(-of_target(log_p, target), target.ne(1), mean)
    loss = check(model, LossOptions("direct", 1, mean), (source, target), want)
    exact = (log_p.argmax(-1).eq(target) | target.eq(1)).all(1).sum()
    assert float(loss.sums["exact"]) == int(exact)
    assert float(loss.sums["tokens"]) == int(target.ne(1).sum())


def test_label_smoothing_is_fairseqs():
    """As Szegedy et al. (2016) in fairseq's form: e / (V - 1) for every other word."""
    model = small_model("metro")
    source, _, target = random_batch()
    log_p = log_probs(model, source, target)
    share = 0.1 / (log_p.shape[-1] - 1)
    value = -(1 - 0.1 - share) * of_target(log_p, target) - share * log_p.sum(-1)
    want = average(value, target.ne(1), "tokens")
    check(model, LossOptions("direct", 1, label_smoothing=0.1), (source, target), want)


@pytest.mark.parametrize("kind", ["metro", "t5"])
@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_direct_unlikelihood_adds_the_wrong_label_on_its_own_tokens(kind, mean):
    """Right and wrong label differ in length; each term is a mean of its own."""
    model = small_model(kind)
    source, wrong, target = random_batch()
    likelihood = -of_target(log_probs(model, source, target), target)
    p = of_target(log_probs(model, source, wrong), wrong).exp()
    want = average(likelihood, target.ne(1), mean) + 3 * average(
        -(1 - p + 0.01).log(), wrong.ne(1), mean
    )
    loss = check(model, LossOptions("direct+ul", 1, mean), (source, target, wrong), want)
    right = -(likelihood * target.ne(1)).sum(1)
    other = (p.log() * wrong.ne(1)).sum(1)
    assert float(loss.sums["ranked_right"]) == int((right > other).sum())


def test_a_smoothed_loss_of_padding_alone_is_zero():
    """A row of padding, as in a batch filled up: it adds nothing."""
    model = small_model("metro")
    source, _, target = random_batch()
    options = LossOptions("direct", 1, label_smoothing=0.1)
    plain = batch_loss(model, options, source, target).total
    padded = F.pad(target, (0, 3), value=1)
    torch.testing.assert_close(batch_loss(model, options, source, padded).total, plain)
