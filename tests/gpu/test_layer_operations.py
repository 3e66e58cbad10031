"""The operations of whole layers on a GPU: kernels, products with an epilogue, the optimiser.

Oracle: float64 on the CPU. Run by `scripts/gpu_suite.sh`; skipped where there is no GPU.
"""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (make install)")

from metro.ops.adamw import adamw_step  # noqa: E402
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm  # noqa: E402
from metro.ops.feed_forward import feed_forward  # noqa: E402
from metro.ops.linear import packed_linear  # noqa: E402
from tests.ops import test_linear_cross_entropy as projection  # noqa: E402
from tests.ops.test_dropout_add_layer_norm import copies, formula, inputs  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TYPES = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
"""Type, and largest error allowed relative to the norm."""


def drawn(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(s, generator=generator) * s[-1] ** -0.5).to("cuda", dtype).requires_grad_()
        for s in shapes
    ]


def check(run, leaves, tolerance):
    """`run` on the leaves beside `run` on them in float64 on the CPU, outputs and gradients."""
    exact = [x.detach().double().cpu().requires_grad_() for x in leaves]
    found = []
    for own in (leaves, exact):
        outs = run(own)
        upstream = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outs]
        found.append([*outs, *torch.autograd.grad(outs, own, upstream)])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert (a.double().cpu() - b).norm() <= tolerance * b.norm() + 1e-12


@pytest.mark.parametrize("dtype, tolerance", TYPES)
@pytest.mark.parametrize("impl", ["reference", "epilogue", "auto"])
def test_feed_forward(dtype, tolerance, impl):
    leaves = drawn(dtype, (3, 37, 64), (136, 64), (136,), (64, 136), (64,))
    check(
        lambda own: [feed_forward(*own, impl=impl if own[0].is_cuda else "reference")],
        leaves,
        tolerance,
    )


@pytest.mark.parametrize("dtype, tolerance", TYPES)
@pytest.mark.parametrize("impl", ["summed", "packed", "auto"])
@pytest.mark.parametrize("rows", [37, 700])
def test_packed_linear(dtype, tolerance, impl, rows):
    leaves = drawn(dtype, (rows, 64), *[(64, 64)] * 3, *[(64,)] * 3)
    check(
        lambda own: packed_linear(
            own[0], own[1:4], own[4:], impl if own[0].is_cuda else "reference"
        ),
        leaves,
        tolerance,
    )


@pytest.mark.parametrize("width", [768, 1024, 4096])
def test_wide_rows_in_bf16(width):
    leaves = copies(inputs((301, width)), torch.bfloat16, "cuda")
    check(
        lambda own: [
            dropout_add_layer_norm(*own, impl="triton") if own[0].is_cuda else formula(*own)
        ],
        leaves,
        2e-2,
    )


def test_gradients_of_weight_and_bias_have_the_same_bits_every_time():
    leaves = copies(inputs((5000, 768)), torch.bfloat16, "cuda")
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        out = dropout_add_layer_norm(*leaves, p=0.1, impl="triton")
        found.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_adamw_steps_are_those_of_the_formula_on_the_cpu():
    shapes = [(300, 70), (5,), (1024, 33)]
    settings = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    on_cpu = [[torch.randn(s) for s in shapes] for _ in range(2)]
    on_cpu += [[torch.zeros(s) for s in shapes] for _ in range(2)]
    on_gpu = [[x.cuda() for x in xs] for xs in on_cpu]
    for step in range(1, 4):
        adamw_step(*on_cpu, step, impl="reference", **settings)
        adamw_step(*on_gpu, step, **settings)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_finetuning_takes_the_fused_adamw(tmp_path):
    from metro.finetuning.run import training_arguments
    from metro.finetuning.settings import FinetuningSettings

    settings = FinetuningSettings(model="model", data="data", output_dir=str(tmp_path))
    assert training_arguments(settings).optim == "adamw_torch_fused"


@pytest.mark.parametrize("has_ignored", [False, True])
def test_the_reference_on_a_gpu_equals_itself_on_the_cpu(has_ignored):
    """On a GPU ignored rows are computed and left out; on the CPU they are not computed."""
    leaves, targets = projection.inputs(33, 16, 65, ignored=(0, 5) if has_ignored else ())
    found = []
    for device in ("cpu", "cuda"):
        hidden, weight, bias = own = [x.detach().to(device).requires_grad_() for x in leaves]
        got = projection.linear_cross_entropy(hidden, weight, targets.to(device), bias_V=bias)
        gradients = projection.gradients(got.loss, 1.0, own)
        found.append([x.cpu() for x in (got.loss, got.correct, *gradients)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
