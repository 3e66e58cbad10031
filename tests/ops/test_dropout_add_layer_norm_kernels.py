"""The Triton kernels against the formula in float64, and whether they compile without a GPU.

Where they run: see triton_tests.py.
"""

import pytest
import torch

from benchmarks.compiled_kernels import Launch
from tests.ops.test_dropout_add_layer_norm import (
    EPS,
    copies,
    dropout_add_layer_norm,
    formula,
    inputs,
)
from tests.ops.triton_tests import (
    DEVICE,
    HAS_GPU,
    INTERPRETED,
    SHARED_MEMORY,
    assert_passes_in_the_interpreter,
    compile_and_fit,
    runs,
)

pytest.importorskip("triton", reason="needs the package triton")
pytestmark = pytest.mark.gpu  # scripts/gpu_suite.sh runs them too

SHAPES = [(2, 8, 16), (37, 24), (5, 3), (1, 1), (0, 4), (3, 130)]


def kept_by(shape, p, seed):
    """What the kernel keeps: of ones and zeros, the ones are above the mean of their row."""
    x = torch.ones(shape, device=DEVICE)
    weight, bias = torch.ones(shape[-1], device=DEVICE), torch.zeros(shape[-1], device=DEVICE)
    torch.manual_seed(seed)
    out = dropout_add_layer_norm(x, torch.zeros_like(x), weight, bias, p=p, impl="triton")
    return (out > 0).cpu()


@runs
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_formula(shape):
    truth = inputs(shape)
    single = copies(truth, torch.float32, DEVICE)
    want, got = formula(*truth), dropout_add_layer_norm(*single, eps=EPS, impl="triton")
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(shape, dtype=torch.float64)
    want_gradients = torch.autograd.grad((want * upstream).sum(), truth)
    got_gradients = torch.autograd.grad((got * upstream.float().to(DEVICE)).sum(), single)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=5e-5)


@runs
@pytest.mark.parametrize("shape", [(33, 24), (7, 128), (2, 5, 70)])
def test_with_dropout_values_and_gradients_equal_the_formula_with_what_was_kept(shape):
    """What was kept is read off the output of ones; both passes must have kept the same."""
    p = 0.3
    kept = kept_by(shape, p, seed=5)
    assert 0 < kept.sum() < kept.numel()
    p_drawn = round(p * 2**16) / 2**16
    truth = inputs(shape)
    single = copies(truth, torch.float32, DEVICE)
    want = formula(*truth, kept, p_drawn)
    torch.manual_seed(5)
    got = dropout_add_layer_norm(*single, p=p, eps=EPS, impl="triton")
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(shape, dtype=torch.float64)
    want_gradients = torch.autograd.grad((want * upstream).sum(), truth)
    torch.manual_seed(6)  # the backward pass draws nothing new
    got_gradients = torch.autograd.grad((got * upstream.float().to(DEVICE)).sum(), single)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=5e-5)


@runs
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_dropped_independently_at_the_asked_rate(monkeypatch, p):
    """Five standard errors of the rate, and of the correlation along and across rows."""
    if INTERPRETED:  # many rows at a time: the interpreter takes as long for few
        from metro.ops.kernels import dropout_add_layer_norm as kernels

        monkeypatch.setattr(kernels, "ROWS", 256)
    kept = kept_by((500, 256), p, seed=1).float()
    count, variance = kept.numel(), p * (1 - p)
    assert abs(float(kept.mean()) - (1 - p)) < 5 * (variance / count) ** 0.5 + 2**-17
    centred = kept - (1 - p)
    for other in (centred[1:], centred[2:], centred[:, 1:], centred[:, 2:], centred[:, 8:]):
        rows, columns = other.shape
        correlation = float((other * centred[:rows, :columns]).mean()) / variance
        assert abs(correlation) < 5 / other.numel() ** 0.5
    for step in (1, 2, 4, 8, 16):
        correlation = float((centred[:, step:] * centred[:, :-step]).mean()) / variance
        assert abs(correlation) < 5 / (count - step * len(kept)) ** 0.5
    assert not torch.equal(kept, kept_by((500, 256), p, seed=2).float())


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_pytorch_in_it(dtype):
    """Truth: float64 of the same rounded inputs. The rule of every kernel: twice eager's error."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("NumPy, which interprets, has no bfloat16")
    leaves = copies(inputs((40, 48)), dtype)
    truth_leaves = copies(leaves, torch.float64)
    truth = formula(*truth_leaves)
    upstream = torch.randn(truth.shape, dtype=torch.float64).to(dtype)
    truth_gradients = torch.autograd.grad((truth * upstream.double()).sum(), truth_leaves)

    def errors(device, impl):
        own = copies(leaves, dtype, device)
        out = dropout_add_layer_norm(*own, eps=EPS, impl=impl)
        assert out.dtype == dtype
        yield float((out.cpu().double() - truth).abs().detach().max())
        found = torch.autograd.grad(out, own, upstream.to(device))
        for a, b in zip(found, truth_gradients, strict=True):
            assert a.dtype == dtype
            yield float((a.cpu().double() - b).norm() / b.norm())

    ours, theirs = errors(DEVICE, "triton"), errors("cpu", "reference")
    for error, eager_error in zip(ours, theirs, strict=True):
        assert error <= 2 * eager_error + torch.finfo(dtype).eps


@runs
def test_types_are_those_of_pytorch_under_autocast():
    """A product's output in half precision and a float32 residual: gradients keep their types."""
    truth = inputs((9, 32))
    x, *others = copies(truth, torch.float32, DEVICE)
    x = x.detach().half().requires_grad_()
    got = dropout_add_layer_norm(x, *others, eps=EPS, impl="triton")
    assert got.dtype == torch.float32
    want = formula(x.detach().cpu().double(), *truth[1:])
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(got.square().sum(), [x, *others])
    assert [t.dtype for t in found] == [torch.float16] + 3 * [torch.float32]
    # Without dropout both summands have one gradient.
    torch.testing.assert_close(found[0], found[1].half())
    with torch.autocast(DEVICE, torch.bfloat16):
        in_half = dropout_add_layer_norm(x, others[0].half(), *others[1:], impl="triton")
    assert in_half.dtype == torch.float32


@runs
def test_everything_and_nothing_can_be_dropped():
    x, residual, weight, bias = copies(inputs((4, 16)), torch.float32, DEVICE)
    all_dropped = dropout_add_layer_norm(x, residual, weight, bias, p=1.0, impl="triton")
    want = formula(torch.zeros_like(residual), residual, weight, bias)
    torch.testing.assert_close(all_dropped, want, rtol=1e-5, atol=1e-5)
    in_evaluation = dropout_add_layer_norm(
        x, residual, weight, bias, p=0.9, training=False, impl="triton"
    )
    torch.testing.assert_close(
        in_evaluation, formula(x, residual, weight, bias), rtol=1e-5, atol=1e-5
    )


@runs
def test_shapes_that_do_not_fit_are_refused():
    x, residual, weight, bias = copies(inputs((4, 16)), torch.float32, DEVICE)
    with pytest.raises(ValueError, match=r"\(4, 16\), \(3, 16\)"):
        dropout_add_layer_norm(x, residual[:3], weight, bias, impl="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("name", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_kernels_compile_and_fit(architecture, name, monkeypatch, tmp_path):
    """Oracle: Triton's own compiler."""
    from metro.ops.kernels import dropout_add_layer_norm as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"eps": "fp32", "kept_scale": "fp32", "seed": "*i64"}
    types |= dict.fromkeys(("means", "scales", "grad_weights", "grad_biases"), "*fp32")
    tensors = "x residual weight bias out grad grad_x grad_residual".split()
    types |= dict.fromkeys(tensors, f"*{name}")
    constants = {"DROPS": True, "WRITES_X": True, **kernels.block_sizes(768)}
    num_warps = constants.pop("num_warps")
    for kernel in (kernels.normalise_kernel, kernels.normalise_backward_kernel):
        launch = Launch(kernel, types, constants, {"num_warps": num_warps})
        compile_and_fit(launch, architecture)


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the tests above run as they are")
def test_kernels_pass_in_the_interpreter():
    """The tests above, in a process that imports Triton with its interpreter."""
    assert_passes_in_the_interpreter(__file__, timeout=600)


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the interpreter runs on the CPU")
def test_without_a_gpu_the_remedy_is_named():
    with pytest.raises(ValueError, match="needs a GPU.*'auto'"):
        dropout_add_layer_norm(*copies(inputs((1, 2)), torch.float32), impl="triton")
