"""The operation against its formula in float64."""

import pytest
import torch

from metro.ops.linear import packed_linear, packing_pays

IMPLS = ("reference", "summed", "packed")


def leaves(shape, outputs, dtype=torch.float64):
    """x, weights and biases."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, *((o, shape[-1]) for o in outputs), *((o,) for o in outputs)]
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def of(inputs, impl):
    num_layers = len(inputs) // 2
    return packed_linear(inputs[0], inputs[1 : 1 + num_layers], inputs[1 + num_layers :], impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape, outputs", [((2, 5, 8), (8, 8, 8)), ((7, 3), (2, 5)), ((0, 4), (4, 4)), ((3, 4), (5,))]
)
def test_values_and_gradients_equal_the_formula(impl, shape, outputs):
    truth, single = leaves(shape, outputs), leaves(shape, outputs, torch.float32)
    n = len(outputs)
    x, weights, biases = truth[0], truth[1 : 1 + n], truth[1 + n :]
    want = [x @ w.T + b for w, b in zip(weights, biases, strict=True)]
    got = of(single, impl)
    upstream = [torch.randn(w.shape, dtype=torch.float64) for w in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    want_gradients = torch.autograd.grad(want, truth, upstream)
    got_gradients = torch.autograd.grad(got, single, [u.float() for u in upstream])
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["summed", "packed"])
def test_only_what_is_trained_gets_a_gradient_and_an_unused_output_gives_none(impl):
    """Frozen weights, and an output that no loss depends on: zeros flow back from there."""
    x, *parameters = leaves((3, 4), (4, 4), torch.float32)
    parameters[0].requires_grad_(False)
    first, _ = of([x, *parameters], impl)
    first.sum().backward()
    want = torch.ones(3, 4) @ parameters[0]
    torch.testing.assert_close(x.grad, want)
    assert parameters[0].grad is None and not parameters[1].grad.any()


def test_under_autocast_products_are_rounded_and_gradients_are_not():
    """Oracle: PyTorch's layers under autocast."""
    found = []
    for impl in ("reference", "summed", "packed"):
        inputs = leaves((6, 8), (8, 8, 8), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            outs = of(inputs, impl)
        assert {out.dtype for out in outs} == {torch.bfloat16}
        gradients = torch.autograd.grad(sum(out.float().sum() for out in outs), inputs)
        found.append([*outs, *gradients])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_packing_pays_where_rereading_the_input_moves_more_than_copying_the_weights():
    """By hand: at width 4 three weights and their copy are 96 numbers, 12 rows read twice too."""
    assert not packing_pays(12, 4, 3) and packing_pays(13, 4, 3)
