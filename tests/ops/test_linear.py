"""The layer against its formula in float64, and when oneDNN computes it."""

import pytest
import torch
import torch.nn.functional as F

from metro.ops import linear as op
from metro.ops.linear import linear, linear_into

HAS_ONEDNN = op.onednn_is_faster(torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Relative to the largest output: its rounding, in half precision."""


@pytest.fixture
def calls(monkeypatch):
    """Let oneDNN compute every type where this PyTorch has it; lists the types that it did."""
    if not HAS_ONEDNN:
        pytest.skip("no CPU with AVX-512, or PyTorch without oneDNN")
    found = []
    monkeypatch.setattr(op, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(op, "onednn_is_faster", lambda dtype: found.append(dtype) or True)
    return found


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def check(got, x, weight, bias=None, has_relu=False):
    want = x.double() @ weight.double().T
    want = want if bias is None else want + bias.double()
    want = want.clamp(min=0) if has_relu else want
    assert got.dtype == x.dtype
    error = (got.double() - want).abs().max()
    assert error <= TOLERANCE[x.dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape, outputs", [((2, 5, 8), 16), ((7, 33), 5), ((1, 1), 1)])
def test_values_equal_the_formula(calls, dtype, has_relu, has_bias, shape, outputs):
    x, weight, bias = tensors(shape, (outputs, shape[-1]), (outputs,), dtype=dtype)
    bias = bias if has_bias else None
    check(linear(x, weight, bias, has_relu), x, weight, bias, has_relu)
    assert calls == [dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_transposed_sliced_and_repeated_matrices(calls, dtype):
    """A weight's transpose going back, part of a vocabulary, the gradient of a sum."""
    x, weight, grad = tensors((6, 8), (12, 8), (6, 12), dtype=dtype)
    check(linear(grad, weight.T), grad, weight.T)
    check(linear(x, weight[3:7]), x, weight[3:7])
    check(linear(x[1::2], weight), x[1::2], weight)
    assert len(calls) == 3
    ones, bias = torch.ones((), dtype=dtype).expand(6, 12), grad[:2].flatten()[::2]
    check(linear(ones, weight.T), ones, weight.T)
    check(linear(x, weight, bias), x, weight, bias)
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:TF32")
def test_a_product_is_written_to_rows(calls):
    out, x, weight = tensors((5, 3), (2, 8), (3, 8))
    kept = out.clone()
    linear_into(out[1:3], x, weight)
    check(out[1:3], x, weight)
    num_calls = len(calls)
    assert num_calls and torch.equal(out[3:], kept[3:]) and torch.equal(out[0], kept[0])
    with torch.backends.mkldnn.flags(enabled=False):
        linear_into(out[3:], x, weight)
    check(out[3:], x, weight)
    assert len(calls) == num_calls


def test_small_weights_of_float32_are_left_to_pytorch(calls, monkeypatch):
    monkeypatch.setattr(op, "LEAST_WEIGHT", 8)
    x, weight = tensors((3, 4), (2, 4))
    linear(x, weight[:1])
    assert not calls
    linear(x.bfloat16(), weight[:1].bfloat16())
    linear(x, weight)
    assert calls == [torch.bfloat16, torch.float32]


def test_forward_derivatives_are_pytorchs(calls):
    x, weight, tangent = tensors((3, 4), (2, 4), (3, 4))
    _, got = torch.func.jvp(lambda x: linear(x, weight), (x,), (tangent,))
    torch.testing.assert_close(got, tangent @ weight.T)
    assert not calls


def test_products_of_bfloat16_are_summed_in_float32_with_the_bias_and_rounded_once(calls):
    """By hand: 256 and 1 round to 256, and 256 - 256 + 1 is 1 only where the sum was not."""
    x = torch.tensor([[256.0, 1.0]]).bfloat16()
    weight, bias = torch.ones(1, 2).bfloat16(), torch.tensor([-256.0]).bfloat16()
    assert linear(x, weight, bias).item() == 1.0


def test_what_has_a_gradient_is_computed_by_pytorch(calls):
    x, weight = tensors((3, 4), (2, 4))
    weight.requires_grad_()
    linear(x, weight, has_relu=True).sum().backward()
    assert weight.grad is not None and not calls
    with torch.no_grad():
        linear(x, weight)
    assert calls


def test_other_types_and_empty_inputs_are_left_to_pytorch(calls):
    x, weight = tensors((3, 4), (2, 4))
    torch.testing.assert_close(linear(x.double(), weight.double()), (x @ weight.T).double())
    assert linear(x[:0], weight).shape == (0, 2)
    assert linear(x[:, :0], weight[:, :0]).tolist() == [[0.0, 0.0]] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.bfloat16())
    assert not calls


@pytest.mark.parametrize("has_relu", [False, True])
def test_it_is_pytorchs_where_oneDNN_is_not_faster(monkeypatch, has_relu):
    monkeypatch.setattr(op, "onednn_is_faster", lambda dtype: False)
    x, weight, bias = tensors((3, 4), (2, 4), (2,))
    want = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, weight, bias, has_relu), want.relu() if has_relu else want)


@pytest.mark.parametrize(
    "vendor, wanted", [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)]
)
def test_float32_is_oneDNNs_on_cpus_of_amd(monkeypatch, tmp_path, vendor, wanted):
    if not HAS_ONEDNN:
        pytest.skip("no CPU with AVX-512, or PyTorch without oneDNN")
    path = tmp_path / "cpuinfo"
    if vendor:
        path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(op, "CPU_INFO", path)
    assert op.onednn_is_faster.__wrapped__(torch.float32) is wanted
    assert op.onednn_is_faster.__wrapped__(torch.bfloat16) is True
