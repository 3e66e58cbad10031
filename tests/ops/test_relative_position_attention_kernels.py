"""The Triton kernels against the reference in float64, and whether they compile without a GPU.

Where they run: see triton_tests.py.
"""

import itertools
from typing import NamedTuple

import pytest
import torch

from benchmarks.compiled_kernels import Launch, attention_launch
from metro.ops.relative_position_attention import (
    bias_of_pairs,
    relative_position_attention,
    visible_keys,
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


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes long for each program: a few small tiles, several for each program."""
    from metro.ops.kernels import relative_position_attention as kernels

    if INTERPRETED:
        set_tiles(monkeypatch, kernels, 16)
    monkeypatch.setattr(kernels, "TILES_PER_PROGRAM", 3)


def set_tiles(monkeypatch, kernels, block):
    def sizes(kernel, width, dtype):
        blocks = ("BLOCK",) if kernel == "bias" else ("BLOCK_T", "BLOCK_S")
        return dict.fromkeys(blocks, block) | {"BLOCK_K": max(16, 1 << (width - 1).bit_length())}

    monkeypatch.setattr(kernels, "block_sizes", sizes)


class Case(NamedTuple):
    """Which of the operation's inputs there are."""

    queries: int = 20
    keys: int = 20
    width: int = 8
    bias: bool = True
    mask: str | None = None
    is_causal: bool = False
    positions: bool = False
    has_far: bool = False
    """From distance 8 on to either side the bias stays the same."""


CASES = {
    "plain": Case(bias=False),
    "cross, one row all masked": Case(7, 37, 13, bias=False, mask="right"),
    "more queries than keys": Case(37, 7, 32, bias=False, mask="right"),
    "causal": Case(bias=False, is_causal=True),
    "causal, first keys masked": Case(bias=False, is_causal=True, mask="left"),
    "causal at positions": Case(5, 20, bias=False, is_causal=True, positions=True, mask="right"),
    "bias": Case(32, 32, 16),
    "bias, far away one number": Case(34, 34, 16, has_far=True),
    "bias, causal at positions, far away one number": Case(
        9, 34, is_causal=True, positions=True, has_far=True
    ),
    "bias, one row all masked": Case(mask="right"),
    "bias, causal, the last queries": Case(7, 37, is_causal=True),
    "bias, causal, first keys masked": Case(is_causal=True, mask="left"),
    "bias at positions": Case(18, 37, positions=True, mask="right"),
    "bias, causal at positions, first keys masked": Case(
        18, 37, is_causal=True, positions=True, mask="left"
    ),
}


def inputs(case: Case, batch_size=3, heads=2, dtype=torch.float64):
    """q, k, v, bias and the rest; positions are drawn with replacement and in no order."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = draw(batch_size, case.queries, heads, case.width).transpose(1, 2)
    k, v = (draw(batch_size, case.keys, heads, case.width).transpose(1, 2) for _ in range(2))
    bias = draw(heads, 2 * case.keys - 1) if case.bias else None
    if case.has_far:
        bias = bias[:, (torch.arange(2 * case.keys - 1) - case.keys + 1).clamp(-8, 8)]
    seen = torch.tensor([[case.keys], [0], [3]])[:batch_size]
    keys, mask, positions = torch.arange(case.keys), None, None
    if case.mask:
        mask = keys < seen if case.mask == "right" else keys >= case.keys - seen
    if case.positions:
        positions = torch.randint(case.keys, (batch_size, case.queries), generator=generator)
    return (q, k, v, bias), (mask, case.is_causal, positions)


def moved(leaves, dtype=torch.float32, device=DEVICE):
    return [None if x is None else x.detach().to(device, dtype).requires_grad_() for x in leaves]


def moved_others(others, device=DEVICE):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in others]


def values_and_gradients(leaves, others, **options):
    """Output and gradients, weighted by numbers that are the same for every call, on the CPU."""
    out = relative_position_attention(*leaves, *others, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad((out * weights).sum(), [x for x in leaves if x is not None])
    return [x.detach().cpu().double() for x in (out, *gradients)]


@runs
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_equal_the_reference(case):
    """Oracle: PyTorch's attention in float64. Also where a query sees no key."""
    leaves, others = inputs(case)
    truth = moved(leaves, torch.float64, "cpu")
    want = values_and_gradients(truth, others, impl="reference")
    got = values_and_gradients(moved(leaves), moved_others(others), impl="triton")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_formula_in_it(dtype):
    """Truth: float64 of the same rounded inputs. The rule of every kernel: twice eager's error."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("NumPy, which interprets, has no bfloat16")
    leaves, others = inputs(Case(width=16, mask="right"), dtype=dtype)
    mask = others[0] | (torch.arange(20) < 2)  # a row that sees nothing overflows in float16
    want = values_and_gradients(moved(leaves, torch.float64, "cpu"), (mask,), impl="reference")
    own = moved_others((mask,))
    got = values_and_gradients(moved(leaves, dtype), own, impl="triton")

    q, k, v, bias = eager_leaves = moved(leaves, dtype, "cpu")
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias_of_pairs(bias, 20, 20, None)
    eager = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v
    weights = torch.randn(eager.shape, generator=torch.Generator().manual_seed(1)).to(eager)
    eager = [eager, *torch.autograd.grad((eager * weights).sum(), eager_leaves)]
    for ours, theirs, truth in zip(got, eager, want, strict=True):
        eager_error = (theirs.detach().double() - truth).norm() / truth.norm()
        assert (ours - truth).norm() / truth.norm() <= 2 * eager_error + torch.finfo(dtype).eps


@runs
@pytest.mark.parametrize("positions", [False, True])
def test_dropout_drops_the_same_weights_forward_and_backward(positions):
    """Oracle: the formula on the dropped weights, which values of ones and zeros make visible."""
    case = Case(queries=20, keys=20, width=20, mask="right", is_causal=True, positions=positions)
    leaves, (mask, is_causal, chosen) = inputs(case)
    mask, rate = mask | (torch.arange(20) < 2), 0.3
    single, others = moved(leaves), moved_others((mask, is_causal, chosen))
    q, k, v, bias = single
    ones = torch.eye(20, device=DEVICE).expand_as(v)
    torch.manual_seed(3)
    dropped = relative_position_attention(q, k, ones, bias, *others, rate, "triton") == 0
    torch.manual_seed(3)
    got = values_and_gradients(single, others, dropout=rate, impl="triton")

    q, k, v, bias = truth = moved(leaves, torch.float64, "cpu")
    visible = visible_keys(q, k, mask, is_causal, chosen)
    kept = ~dropped.cpu()
    share = kept[visible.expand_as(kept)].double().mean()
    assert not kept[~visible.expand_as(kept)].any() and 0.65 < share < 0.75
    scores = q @ k.transpose(-1, -2) / 20**0.5 + bias_of_pairs(bias, 20, 20, chosen)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    want = (weights * kept / (1 - rate)) @ v
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    want = [want, *torch.autograd.grad((want * upstream).sum(), truth)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=2e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_weights_are_dropped_independently_at_the_rate(monkeypatch, rate):
    """Oracle: the binomial distribution, for all pairs, for each query, and for each key.

    Then for pairs of neighbours, of opposite corners of rectangles (which one number for each query
    and key could tie together), and for heads, that they agree as often as independent ones.
    """
    from metro.ops.kernels import relative_position_attention as kernels

    length, heads = 128, 8
    if INTERPRETED:
        set_tiles(monkeypatch, kernels, length)  # one program for a head, to be fast
    torch.manual_seed(0)
    zeros = torch.zeros(1, heads, length, length, device=DEVICE)
    ones = torch.eye(length, device=DEVICE).expand_as(zeros)
    out = relative_position_attention(zeros, zeros, ones, dropout=rate, impl="triton").cpu()
    torch.testing.assert_close(out.unique() * length, torch.tensor([0.0, 1 / (1 - rate)]))
    kept = (out[0] > 0).double()
    standard = (kept - (1 - rate)) / (rate * (1 - rate)) ** 0.5
    # Sums over n divided by sqrt(n) are standard normal.
    assert abs(standard.sum()) / standard.numel() ** 0.5 < 5
    for axis in (1, 2):
        of_each = standard.sum(axis) / length**0.5
        assert of_each.abs().max() < 5 and 0.8 < of_each.square().mean() < 1.2
    products = [
        standard[:, 1:] * standard[:, :-1],
        standard[:, :, 1:] * standard[:, :, :-1],
        standard[:, 1:, 1:] * standard[:, :-1, :-1],
        standard[1:] * standard[:-1],
        standard[:, 1:, 1:] * standard[:, :-1, :-1] * standard[:, 1:, :-1] * standard[:, :-1, 1:],
    ]
    for product in products:
        assert abs(product.sum()) / product.numel() ** 0.5 < 5


@runs
def test_a_seeded_run_drops_the_same_weights_and_an_unseeded_one_others():
    x, outs = torch.randn(1, 2, 16, 16, device=DEVICE), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(relative_position_attention(x, x, x, dropout=0.5, impl="triton"))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@runs
def test_any_layout_of_the_inputs_is_read():
    """Heads of packed projections, transposed widths, and a gradient that is one number."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 20, 3, 2, 16, generator=generator).to(DEVICE)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert v.stride(-1) != 1 and not q.is_contiguous()
    found = []
    for impl in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = relative_position_attention(*leaves, impl=impl)
        found.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)
    assert found[0][0].transpose(1, 2).is_contiguous()


@runs
def test_operators_describe_themselves_to_the_compiler():
    """Oracle: PyTorch's own checks of an operator's schema and of the shapes it promises."""
    from metro.ops.kernels import relative_position_attention as kernels

    (q, k, v, bias), (mask, is_causal, _) = inputs(Case(keys=16, queries=16, mask="right"))
    q, k, v, bias = (x.float().to(DEVICE) for x in (q, k, v, bias))
    random = torch.arange(3 * 2 * 32, dtype=torch.int32, device=DEVICE)
    given = (q, k, v, bias, mask.to(DEVICE), None, random)
    out, lse = kernels.attention_forward(*given, is_causal, 0.1)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.attention_forward_op, (*given, False, 0.1), test_utils=checks)
    backward = (*given, out, lse, out, False, 0.1, True)
    torch.library.opcheck(kernels.attention_backward_op, backward, test_utils=checks)


@runs
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"k": (1, 2, 5, 8), "v": (1, 2, 6, 8)}, "q, k and v have shapes"),
        ({"k": (1, 2, 5, 16), "v": (1, 2, 5, 16)}, "q, k and v have shapes"),
        ({"bias": (2, 10)}, r"bias has shape \(2, 10\); use \(2, 9\)"),
        ({"q": (1, 2, 6, 8), "bias": (2, 9)}, "6 queries of 5 keys"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    """Oracle: the shapes of the docstring."""
    given = {"q": (1, 2, 5, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8), **wrong}
    given = {
        name: torch.zeros(x, device=DEVICE) if isinstance(x, tuple) else x
        for name, x in given.items()
    }
    with pytest.raises(ValueError, match=message):
        relative_position_attention(**given, impl="triton")


@runs
def test_it_compiles_in_one_graph():
    """Oracle: the same call without the compiler, with the same seed."""
    leaves, others = inputs(Case(16, 16, 16, mask="right"), batch_size=1)
    others = moved_others(others)

    def call(q, k, v, bias):
        return relative_position_attention(2 * q, k, v, 2 * bias, *others, 0.2, "triton").square()

    found = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        own = moved(leaves)
        torch.manual_seed(0)
        out = run(*own)
        found.append((out, *torch.autograd.grad(out.sum(), own)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


VARIANTS = {
    "encoder": "bias dropout",
    "auxiliary model's last layer": "bias mask positions dropout",
    "decoder's last layer": "causal positions",
    "cross-attention": "mask",
    "causal with all but positions": "bias mask causal dropout",
}
"""Which of the inputs there are, by where training has them."""


def compiles():
    """Architecture, variant, width and type: those with most inputs in all, the others in one."""
    fullest = ("auxiliary model's last layer", "causal with all but positions")
    others = [(64, "bf16"), (64, "fp32"), (128, "fp16"), (128, "fp32")]
    for architecture, name in itertools.product(SHARED_MEMORY, VARIANTS):
        for width, dtype in [(64, "fp16"), *(others if name in fullest else [])]:
            is_quick = architecture == 90 or name == fullest[0]
            marks = () if is_quick and (width, dtype) == (64, "fp16") else pytest.mark.slow
            test_id = f"sm_{architecture}, {name}, {width}, {dtype}"
            yield pytest.param(architecture, name, width, dtype, marks=marks, id=test_id)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("architecture, variant, width, dtype", list(compiles()))
def test_kernels_compile_and_fit(architecture, variant, width, dtype, monkeypatch, tmp_path):
    """Oracle: Triton's own compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    given = VARIANTS[variant].split()
    for kernel in ("forward", "query_gradient", "key_gradient", "bias_gradient"):
        if kernel == "bias_gradient" and "bias" not in given:
            continue
        found = compile_and_fit(attention_launch(kernel, given, width, dtype), architecture)
        if architecture == 90 and width == 64 and dtype != "fp32":
            # The bias would take as much again, if it were copied ahead as keys and values are.
            assert found.shared <= 96 * 1024 and not found.stack


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_small_kernels_compile(architecture, monkeypatch, tmp_path):
    """Oracle: Triton's own compiler."""
    from metro.ops.kernels import relative_position_attention as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"out": "*fp16", "grad_out": "*fp16", "delta": "*fp32"}
    sizes = kernels.block_sizes("query_gradient", 64, torch.float16)
    sizes = {"K": 64, "BLOCK_T": sizes["BLOCK_T"], "BLOCK_K": sizes["BLOCK_K"]}
    compile_and_fit(Launch(kernels.delta_kernel, pointers, sizes, {}), architecture)
    pointers = {"bias": "*bf16", "scaled": "*fp32", "unit": "fp32"}
    compile_and_fit(Launch(kernels.bias_kernel, pointers, {"BLOCK": 1024}, {}), architecture)
    pointers = {"key_mask": "*u8", "key_range": "*i32"}
    compile_and_fit(Launch(kernels.key_range_kernel, pointers, {"BLOCK": 1024}, {}), architecture)


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the interpreter runs on the CPU")
def test_without_a_gpu_the_remedy_is_named():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="needs a GPU.*'auto'"):
        relative_position_attention(x, x, x, impl="triton")


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the tests above run as they are")
def test_kernels_pass_in_the_interpreter():
    """The tests above, in a process that imports Triton with its interpreter."""
    assert_passes_in_the_interpreter(__file__, timeout=1200)
