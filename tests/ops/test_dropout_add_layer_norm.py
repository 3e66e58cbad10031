"""The operation against its formula in float64, on the CPU."""

import pytest
import torch

from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm

EPS = 1e-5


def inputs(shape, dtype=torch.float64):
    """x, residual, weight and bias; rows of other means and scales, a weight near 0 and below."""
    generator = torch.Generator().manual_seed(0)
    width = shape[-1]

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, residual = draw(*shape) * 2, draw(*shape) + draw(*shape[:-1], 1) * 3
    weight, bias = draw(width) + 0.5, draw(width)
    weight[0] = 0.0
    return [t.to(dtype).requires_grad_() for t in (x, residual, weight, bias)]


def copies(leaves, dtype, device="cpu"):
    return [x.detach().to(device, dtype).requires_grad_() for x in leaves]


def formula(x, residual, weight, bias, kept=None, p=0.0):
    """LayerNorm written out, with given kept elements."""
    z = residual + (x if kept is None else x * kept / (1 - p))
    mean = z.mean(-1, keepdim=True)
    variance = ((z - mean) ** 2).mean(-1, keepdim=True)
    return (z - mean) / (variance + EPS) ** 0.5 * weight + bias


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 2), (0, 4), (1, 1, 17)])
def test_values_and_gradients_equal_the_formula(shape):
    truth = inputs(shape)
    single = copies(truth, torch.float32)
    want, got = formula(*truth), dropout_add_layer_norm(*single, p=0.5, training=False)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(shape, dtype=torch.float64)
    want_gradients = torch.autograd.grad((want * upstream).sum(), truth)
    got_gradients = torch.autograd.grad((got * upstream.float()).sum(), single)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def test_what_is_dropped_is_what_dropout_drops():
    """Oracle: the same seed, the operations one after the other."""
    from metro.ops.dropout import dropout

    x, residual, weight, bias = inputs((6, 40), torch.float32)
    torch.manual_seed(3)
    got = dropout_add_layer_norm(x, residual, weight, bias, p=0.25)
    torch.manual_seed(3)
    kept = dropout(torch.ones_like(x), 0.25) > 0
    assert 0 < kept.sum() < kept.numel()
    want = formula(x, residual, weight, bias, kept, 0.25)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
