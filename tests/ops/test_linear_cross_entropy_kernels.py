"""The Triton kernels against the formula in float64, and whether they compile without a GPU.

Where they run: see triton_tests.py.
"""

import pytest
import torch

from benchmarks.compiled_kernels import projection_launch
from tests.ops.test_linear_cross_entropy import (
    OPTIONS,
    copies,
    formula,
    gradients,
    inputs,
    linear_cross_entropy,
    op,
)
from tests.ops.test_linear_sample_cross_entropy import chi_square, draws
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


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes seconds for a full tile: several parts of several small tiles each."""
    if DEVICE == "cpu" and INTERPRETED:
        from metro.ops.kernels import linear_cross_entropy as kernels

        monkeypatch.setattr(kernels, "BLOCKS_PER_PART", 2)
        sizes = {"BLOCK_N": 16, "BLOCK_V": 16, "BLOCK_D": 16}
        monkeypatch.setattr(kernels, "block_sizes", lambda kernel, width, dtype: sizes)


def on_device(leaves):
    return [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in leaves]


SHAPES = [
    (32, 32, 64, True, ()),
    (7, 5, 13, True, (0, 6)),
    (33, 17, 65, False, range(20, 30)),
    (1, 3, 2, True, ()),
    (0, 4, 9, True, ()),
]


@runs
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows, width, vocab_size, has_bias, ignored", SHAPES)
def test_values_and_gradients_equal_the_formula(
    monkeypatch, options, rows, width, vocab_size, has_bias, ignored
):
    """One chunk of all rows, or several."""
    for name in ("CHUNK_LOGITS", "CUDA_CHUNK_LOGITS"):
        monkeypatch.setattr(op, name, 200)
    leaves, targets = inputs(rows, width, vocab_size, has_bias, ignored)
    want, want_correct = formula(*leaves, targets, **options)
    upstream = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want_gradients = gradients(want, upstream, leaves)
    hidden, weight, bias = single = on_device(copies(leaves, torch.float32))
    got = linear_cross_entropy(
        hidden, weight, targets.to(DEVICE), bias_V=bias, impl="triton", **options
    )
    assert torch.equal(got.correct.cpu(), want_correct)
    torch.testing.assert_close(got.loss.cpu().double(), want, rtol=2e-5, atol=2e-5)
    got_gradients = gradients(got.loss, upstream.float().to(DEVICE), single)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-5, atol=2e-5)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_half_precision_errs_no_more_than_the_formula_in_it(dtype, options):
    """Truth: float64 of the same rounded inputs. The rule of every kernel: twice eager's error."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("NumPy, which interprets, has no bfloat16")
    leaves, targets = inputs(30, 24, 100, ignored=(3,), dtype=dtype)
    truth_leaves = copies(leaves, torch.float64)
    truth, _ = formula(*truth_leaves, targets, **options)
    truth_gradients, truth = gradients(truth, 1.0, truth_leaves), truth.detach()
    eager_leaves, own = copies(leaves, dtype), on_device(leaves)
    logits = torch.nn.functional.linear(*eager_leaves).float()
    eager, _ = formula(logits, torch.eye(100), None, targets, **options)
    got = linear_cross_entropy(
        own[0], own[1], targets.to(DEVICE), bias_V=own[2], impl="triton", **options
    )

    def errors(loss, its_leaves):
        yield float((loss.detach().cpu().double() - truth).abs().max())
        for a, b in zip(gradients(loss, 1.0, its_leaves), truth_gradients, strict=True):
            yield float((a.cpu().double() - b).norm() / b.norm())

    for ours, theirs in zip(errors(got.loss, own), errors(eager, eager_leaves), strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps


@runs
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_samples_follow_the_softmax(monkeypatch, spread):
    """A fair sampler exceeds 5 standard deviations once in a million."""
    if INTERPRETED:  # many rows at a time: the interpreter takes as long for few
        from metro.ops.kernels import linear_cross_entropy as kernels

        sizes = {"BLOCK_N": 2048, "BLOCK_V": 16, "BLOCK_D": 16}
        monkeypatch.setattr(kernels, "block_sizes", lambda kernel, width, dtype: sizes)
    samples, probabilities = draws(20_000, 40, spread, impl="triton", device=DEVICE)
    assert chi_square(samples.cpu(), probabilities) < 5


@runs
def test_a_sample_depends_on_its_own_row_alone():
    from metro.ops.linear_sample_cross_entropy import linear_sample_cross_entropy

    (hidden, weight, bias), targets = inputs(40, 8, 50, dtype=torch.float32)
    hidden, weight, bias = on_device((hidden, weight, bias))
    targets, seeds = targets.to(DEVICE), torch.arange(40, device=DEVICE) % 3
    counters = torch.arange(40, device=DEVICE)

    def samples(rows, seeds=seeds):
        given = (hidden[rows], weight, targets[rows], seeds[rows], counters[rows])
        return linear_sample_cross_entropy(*given, bias_V=bias, impl="triton").samples

    together, picked = samples(slice(None)), torch.tensor([31, 5, 17, 3], device=DEVICE)
    assert len(together.unique()) > 5
    assert torch.equal(samples(picked), together[picked])
    assert not torch.equal(samples(slice(None), seeds + 3), together)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_kernels_compile_and_fit(architecture, dtype, monkeypatch, tmp_path):
    """Oracle: Triton's own compiler. In half precision nothing is spilled on sm_90."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in ("reduce", "gradient"):
        launch = projection_launch(kernel, ["bias", "sampling"], 768, dtype)
        found = compile_and_fit(launch, architecture)
        assert architecture != 90 or dtype == "fp32" or not found.stack


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the tests above run as they are")
def test_kernels_pass_in_the_interpreter():
    """The tests above, in a process that imports Triton with its interpreter."""
    assert_passes_in_the_interpreter(__file__, timeout=600)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_without_a_gpu_the_remedy_is_named():
    with pytest.raises(ValueError, match="needs a GPU.*'auto'"):
        zeros = torch.zeros(1, 1)
        linear_cross_entropy(zeros, zeros, torch.zeros(1, dtype=torch.int64), impl="triton")
