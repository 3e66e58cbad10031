"""The Triton kernels on a GPU: the tests that elsewhere run in Triton's interpreter.

Run by `scripts/gpu_suite.sh`; skipped where there is no GPU.
"""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (make install)")

from tests.ops.test_linear_cross_entropy_kernels import (  # noqa: E402, F401
    test_a_sample_depends_on_its_own_row_alone,
    test_half_precision_errs_no_more_than_the_formula_in_it,
    test_kernels_compile_and_fit,
    test_samples_follow_the_softmax,
    test_values_and_gradients_equal_the_formula,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("has_ignored", [False, True])
def test_the_reference_on_a_gpu_equals_itself_on_the_cpu(has_ignored):
    """On a GPU ignored rows are computed and left out; on the CPU they are not computed."""
    from metro.ops.linear_cross_entropy import linear_cross_entropy
    from tests.ops.test_linear_cross_entropy import copies, gradients, inputs

    leaves, targets = inputs(33, 16, 65, ignored=(0, 5) if has_ignored else ())
    found = []
    for device in ("cpu", "cuda"):
        hidden, weight, bias = own = [
            x.to(device).detach().requires_grad_() for x in copies(leaves, torch.float64)
        ]
        got = linear_cross_entropy(hidden, weight, targets.to(device), bias_V=bias)
        found.append([x.cpu() for x in (got.loss, got.correct, *gradients(got.loss, 1.0, own))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
