"""Dropout against its definition: what is kept, how often, and its gradient."""

import pytest
import torch

from metro.ops.dropout import bit_masks, draw_kept, drop, dropout, pack, random_of, unpack


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_dropped_independently_at_the_asked_rate(p):
    """Five standard errors of the rate, and of the correlation of neighbours."""
    kept = draw_kept(torch.Size((1001, 999)), p, random_of(0)).float()
    count, variance = kept.numel(), p * (1 - p)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(float(kept.mean()) - (1 - p)) < 5 * (variance / count) ** 0.5 + 2**-17
    centred = (kept - (1 - p)).flatten()
    for step in (1, 2, 3, 4):
        correlation = float((centred[step:] * centred[:-step]).mean()) / variance
        assert abs(correlation) < 5 / count**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropping_by_bits_is_multiplying(dtype):
    """Also of a number of elements that fills no byte, and in place."""
    x, kept = torch.randn(3, 7, dtype=dtype), draw_kept(torch.Size((3, 7)), 0.5, random_of(1))
    assert torch.equal(unpack(pack(kept), kept.shape), kept)
    want = x * kept
    masks = bit_masks(kept, dtype)
    assert torch.equal(drop(x, masks, out=torch.empty_like(x)), want)
    assert drop(x, masks, out=x) is x and torch.equal(x, want)


def test_kept_elements_are_scaled_and_so_is_the_gradient():
    x = torch.randn(7, 5, 3).requires_grad_()
    out = dropout(x, 0.25, impl="bits")
    kept = out != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(out, torch.where(kept, x / 0.75, 0.0))
    weights = torch.randn(out.shape)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    torch.testing.assert_close(gradient, torch.where(kept, weights / 0.75, 0.0))


def test_second_derivatives_are_those_of_the_kept_elements():
    """Oracle: y = 2 x^3 where kept, so that the gradient of y^2 is 24 x^5, and its 120 x^4."""
    x = torch.rand(50).add_(0.5).requires_grad_()
    out = dropout(x**3, 0.5, impl="bits")
    (first,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.where(out != 0, 120 * x**4, 0.0))


def test_bits_are_kept_where_checkpointing_finds_them():
    """A bit per element, by way of the hooks of saved tensors, and nothing else."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dropout(torch.randn(100, 3).requires_grad_(), 0.5, impl="bits")
    assert [(x.dtype, x.numel()) for x in kept] == [(torch.uint8, 38)]


def test_a_seeded_run_drops_the_same_elements_and_another_seed_others():
    x, outs = torch.ones(1000), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(dropout(x, 0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_all_may_be_dropped():
    """Also where a rate rounds to 1."""
    x = torch.randn(10).requires_grad_()
    for p in (1.0, 1 - 2**-20):
        out = dropout(x, p, impl="bits")
        assert not out.any() and not torch.autograd.grad(out.sum(), x)[0].any()


def test_nothing_is_dropped_in_evaluation():
    x = torch.randn(10)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0) is x
