"""Attention's kernels on a GPU, beside `tests/ops/test_relative_position_attention_kernels.py`.

Run by `scripts/gpu_suite.sh`; skipped where there is no GPU.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (make install)")

from metro.ops.dispatch import KERNEL_TYPES  # noqa: E402
from metro.ops.kernels.self_check import find_fault  # noqa: E402
from metro.ops.kernels.trials import TRAINED  # noqa: E402
from tests.ops.test_relative_position_attention_kernels import (  # noqa: E402
    CASES,
    inputs,
    moved,
    moved_others,
    values_and_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("width", [64, 128])
def test_attention_of_several_full_tiles_equals_the_reference(case, width):
    """Oracle: PyTorch's attention in float64. In float16 without rows that see nothing."""
    longer = case._replace(queries=case.queries * 9, keys=case.keys * 9, width=width)
    leaves, (mask, is_causal, positions) = inputs(longer)
    others = (mask, is_causal, positions)
    want = values_and_gradients(
        moved(leaves, torch.float64), moved_others(others), impl="reference"
    )
    got = values_and_gradients(moved(leaves), moved_others(others), impl="triton")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=2e-5)
    if mask is not None:  # the lowest float16 is not low enough for the reference's zero weights
        mask[:, 0] = True
    leaves = [None if x is None else x.half() for x in leaves]
    others = moved_others((mask, is_causal, positions))
    want = values_and_gradients(moved(leaves, torch.float64), others, impl="reference")
    got = values_and_gradients(moved(leaves, torch.float16), others, impl="triton")
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 4e-3 * b.norm()


def test_attention_gives_the_same_bits_again():
    """Gradients too: nothing is added in an order that changes."""
    leaves, others = inputs(CASES["bias at positions"]._replace(queries=150, keys=700))
    found = []
    for _ in range(5):
        torch.manual_seed(0)
        own = moved(leaves, torch.bfloat16)
        given = moved_others(others)
        found.append(values_and_gradients(own, given, dropout=0.1, impl="triton"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_auto_takes_the_kernels_for_bias_and_masks_and_not_for_single_tokens():
    """Oracle: the docstring of `choose_impl`."""
    from metro.ops.relative_position_attention import choose_impl

    q, bias = torch.zeros(2, 2, 64, 16, device="cuda"), torch.zeros(2, 127, device="cuda")
    mask = torch.ones(2, 64, dtype=torch.bool, device="cuda")
    assert choose_impl(q, q, bias, None, False, None, 0.1) == "triton"
    assert choose_impl(q, q, None, mask, False, None, 0.0) == "triton"
    assert choose_impl(q, torch.cat([q, q], 2), None, None, True, None, 0.0) == "triton"
    assert choose_impl(q, q, None, mask, True, None, 0.0) == "triton"
    assert choose_impl(q, q, None, None, True, None, 0.0) == "reference"
    assert choose_impl(q, q, None, None, False, None, 0.0) == "reference"
    assert choose_impl(q[:, :, -1:], q, bias, None, False, None, 0.0) == "reference"
    assert choose_impl(q.double(), q.double(), bias, None, False, None, 0.0) == "reference"


@pytest.mark.parametrize("op", TRAINED)
def test_every_kernel_proves_itself_in_every_type(op):
    """Oracle: its formula in float64, by the check that runs before a kernel is chosen."""
    device = torch.device("cuda", 0)
    for dtype, flags in itertools.product(KERNEL_TYPES, TRAINED[op]):
        if "mixed" not in flags or dtype != torch.float32:
            assert find_fault(op, device, dtype, 64, flags) is None, (dtype, flags)
