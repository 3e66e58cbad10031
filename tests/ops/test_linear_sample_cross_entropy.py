"""Loss against PyTorch's; samples against the softmax by a chi-square test."""

import pytest
import torch
import torch.nn.functional as F

from metro.ops import linear_cross_entropy as op
from metro.ops.linear_sample_cross_entropy import linear_sample_cross_entropy

IGNORE = -100


def inputs(rows=40, width=8, vocab_size=30):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator)
    bias = torch.randn(vocab_size, generator=generator)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[3] = IGNORE
    return [x.requires_grad_() for x in (hidden, weight, bias)], targets


@pytest.mark.parametrize("chunk_logits", [op.CHUNK_LOGITS, 7 * 30])
def test_loss_correctness_and_gradients_are_those_of_pytorch(monkeypatch, chunk_logits):
    monkeypatch.setattr(op, "CHUNK_LOGITS", chunk_logits)
    (hidden, weight, bias), targets = inputs()
    logits = F.linear(hidden, weight, bias)
    want = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    got = linear_sample_cross_entropy(
        hidden, weight, targets, torch.tensor(1), torch.arange(40), bias_V=bias
    )
    torch.testing.assert_close(got.loss, want)
    assert torch.equal(got.correct, logits.argmax(-1) == targets)
    upstream = torch.randn(40)
    for a, b in zip(
        torch.autograd.grad((got.loss * upstream).sum(), (hidden, weight, bias)),
        torch.autograd.grad((want * upstream).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not got.samples.requires_grad


def chi_square(samples: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard deviations above its mean of the statistic over tokens expected five times."""
    expected = probabilities.double() * len(samples)
    counts = torch.bincount(samples, minlength=len(expected)).double()
    common = expected >= 5
    rest = (~common).nonzero().squeeze(-1)
    counts = torch.cat([counts[common], counts[rest].sum(0, keepdim=True)])
    expected = torch.cat([expected[common], expected[rest].sum(0, keepdim=True)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def draws(number: int, vocab_size: int, spread: float, impl: str = "auto", device: str = "cpu"):
    """Many samples of one distribution, and the distribution."""
    logits = spread * torch.randn(vocab_size, generator=torch.Generator().manual_seed(2))
    got = linear_sample_cross_entropy(
        torch.ones(number, 1, device=device),
        logits.unsqueeze(1).to(device),
        torch.zeros(number, dtype=torch.int64, device=device),
        torch.tensor(7, device=device),
        torch.arange(number, device=device),
        impl=impl,
    )
    return got.samples, logits.softmax(-1)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_samples_follow_the_softmax(spread):
    """200,000 draws; a fair sampler exceeds 5 standard deviations once in a million."""
    samples, probabilities = draws(200_000, 50, spread)
    assert chi_square(samples, probabilities) < 5


def test_the_chi_square_catches_a_distribution_off_by_a_tenth():
    """The test can fail: samples of logits times 1.1."""
    samples, probabilities = draws(200_000, 50, 1.0)
    wrong = (probabilities.log() * 1.1).softmax(-1)
    assert chi_square(samples, wrong) > 5


def test_a_sample_depends_on_its_own_row_alone(monkeypatch):
    (hidden, weight, bias), targets = inputs()
    counters = torch.arange(40)

    def samples(rows=slice(None), seeds=counters % 3, **options):
        given = (hidden[rows], weight, targets[rows], seeds[rows], counters[rows])
        return linear_sample_cross_entropy(*given, bias_V=bias, **options).samples

    together, picked = samples(), torch.tensor([31, 5, 17, 3])
    assert len(together.unique()) > 5
    monkeypatch.setattr(op, "CHUNK_LOGITS", 30 * 3)
    assert torch.equal(samples(picked), together[picked])
    assert not torch.equal(samples(seeds=counters % 3 + 3), together)
    assert torch.equal(samples(impl="plain"), together)


def test_leading_dimensions_are_kept_and_seeds_broadcast():
    (hidden, weight, bias), targets = inputs()
    flat = linear_sample_cross_entropy(
        hidden, weight, targets, torch.arange(40) // 10, torch.arange(40) % 10, bias_V=bias
    )
    grid = linear_sample_cross_entropy(
        hidden.view(4, 10, 8),
        weight,
        targets.view(4, 10),
        torch.arange(4).unsqueeze(1),
        torch.arange(10),
        bias_V=bias,
    )
    for a, b in zip(flat, grid, strict=True):
        assert b.shape == (4, 10) and torch.equal(a, b.flatten())


def test_seeds_that_do_not_fit_are_named():
    (hidden, weight, bias), targets = inputs()
    with pytest.raises(ValueError, match=r"seeds \(3,\).*\(40,\)"):
        linear_sample_cross_entropy(hidden, weight, targets, torch.arange(3), torch.tensor(0))
