"""Sampling of the auxiliary model: its distribution, and that it depends on the seed alone."""

import pytest
import torch

from metro.ops.sampling import counter_bits, sample_tokens, uniform_of
from metro.pretraining.configuration import MetroPretrainingConfig


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def counter_uniform(seeds, counters):
    return uniform_of(counter_bits(seeds, counters))


def test_uniforms_are_uniform_and_uncorrelated():
    """Chi-square over 64 bins of 64 seeds x 4096 counters; its 99.9 % quantile is 103."""
    seeds, counters = torch.arange(64).unsqueeze(1) * 7919, torch.arange(4096)
    u = counter_uniform(seeds, counters)
    assert u.shape == (64, 4096) and u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert chi_square(counts, torch.full((64,), u.numel() / 64)) < 103
    centred = u - 0.5
    for a, b in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        correlation = (a * b).mean() / (1 / 12)
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_uniforms_use_all_64_bits_of_the_seed():
    low, high = torch.tensor([5]), torch.tensor([5 + (1 << 62)])
    assert counter_uniform(low, torch.tensor([0])) != counter_uniform(high, torch.tensor([0]))


def test_samples_follow_softmax():
    """Chi-square against softmax for 200,000 draws; 99.9 % quantile with 49 freedoms is 85."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    uniforms = counter_uniform(torch.tensor([11]), torch.arange(200_000))
    samples = sample_tokens(logits.expand(1, 200_000, 50), uniforms.view(1, -1))
    counts = torch.bincount(samples.flatten(), minlength=50).float()
    assert chi_square(counts, logits.softmax(0) * 200_000) < 85


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    uniforms = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-24]])
    samples = sample_tokens(logits.expand(1, 5, 5), uniforms)
    assert samples.tolist() == [[1, 1, 3, 3, 3]]


@pytest.mark.parametrize(
    "option, message",
    [
        ({"rtd_head": "linear"}, "rtd_head is 'linear'; use one of none, simple, roberta"),
        ({"share": "all"}, "share is 'all'"),
        ({"sample_mode": "test"}, "sample_mode is 'test'"),
    ],
)
def test_unknown_options_name_the_valid_ones(option, message):
    with pytest.raises(ValueError, match=message):
        MetroPretrainingConfig(**option)
