"""The operation against its formula in float64, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from metro.ops import feed_forward as op
from metro.ops.feed_forward import feed_forward


def leaves(shape, inner, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    width = shape[-1]
    shapes = (shape, (inner, width), (inner,), (width, inner), (width,))
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def formula(x, weight_in, bias_in, weight_out, bias_out):
    return F.linear(F.linear(x, weight_in, bias_in).clamp(min=0), weight_out, bias_out)


@pytest.mark.parametrize("impl", ["reference", "in_place", "epilogue"])
@pytest.mark.parametrize("rows", [op.ROWS, 4])
@pytest.mark.parametrize("shape, inner", [((2, 5, 8), 16), ((7, 3), 5), ((1, 1, 1), 1)])
def test_values_and_gradients_equal_the_formula(monkeypatch, impl, rows, shape, inner):
    monkeypatch.setattr(op, "ROWS", rows)
    truth, single = leaves(shape, inner), leaves(shape, inner, torch.float32)
    want, got = formula(*truth), feed_forward(*single, impl=impl)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(shape, dtype=torch.float64)
    want_gradients = torch.autograd.grad((want * upstream).sum(), truth)
    got_gradients = torch.autograd.grad((got * upstream.float()).sum(), single)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [op.ROWS, 4])
@pytest.mark.parametrize("shape", [(2, 5, 8), (7, 3), (6,), (0, 4)])
def test_values_without_gradients_equal_the_formula(monkeypatch, rows, shape):
    """Also of more outputs than inputs, and of columns."""
    monkeypatch.setattr(op, "ROWS", rows)
    x, weight_in, bias_in, *_ = [each.detach() for each in leaves(shape, 16)]
    given = (x, weight_in, bias_in, torch.randn(9, 16).double(), torch.randn(9).double())
    got = feed_forward(*(each.float() for each in given), impl="in_place")
    torch.testing.assert_close(got.double(), formula(*given), rtol=1e-5, atol=1e-5)
    if x.ndim == 3:
        x = x.transpose(0, 1)
        got = feed_forward(x.float(), *(each.float() for each in given[1:]), impl="in_place")
        torch.testing.assert_close(got.double(), formula(x, *given[1:]), rtol=1e-5, atol=1e-5)


def test_inputs_of_two_types_are_refused_outside_autocast():
    """As PyTorch refuses them."""
    x, *weights = leaves((3, 4), 8, torch.bfloat16)
    with pytest.raises(ValueError, match="float32, torch.bfloat16, .*cast them to one type"):
        feed_forward(x.detach().float(), *weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert feed_forward(x.detach().float(), *weights).dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["in_place", "epilogue"])
def test_gradient_at_zero_is_that_of_pytorch(impl):
    """Of an activation that is exactly 0 nothing flows back."""
    x = torch.tensor([[1.0, -1.0]]).requires_grad_()
    one, none = torch.ones(1, 2), torch.zeros(1)
    feed_forward(x, one, none, torch.ones(2, 1), torch.zeros(2), impl=impl).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("impl", ["in_place", "epilogue"])
def test_one_tensor_of_the_inner_width_is_kept(impl):
    x, *weights = leaves((64, 4), 100, torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = feed_forward(x, *weights, impl=impl)
    incoming = sum(t.untyped_storage().nbytes() for t in (x, *weights))
    assert out.requires_grad and sum(kept.values()) <= incoming + 64 * 100 * 4


def test_under_autocast_products_are_rounded_and_gradients_are_not():
    """Oracle: PyTorch's layers under autocast."""
    found = []
    for impl in ("reference", "epilogue"):
        given = leaves((6, 8), 16, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = feed_forward(*given, impl=impl)
        found.append([out, *torch.autograd.grad(out.float().sum(), given)])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)
