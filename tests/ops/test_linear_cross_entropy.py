"""The operation against its formula in float64, on all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from metro.ops import linear_cross_entropy as op
from metro.ops import linear_cross_entropy_rows
from metro.ops.linear_cross_entropy import linear_cross_entropy

IGNORE = -100
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "unlikelihood": {"unlikelihood_epsilon": 0.01},
}


def formula(hidden, weight, bias, targets, label_smoothing=0.0, unlikelihood_epsilon=None):
    """The docstring's formula: each row's loss, and whether its target is the most probable."""
    logits = F.linear(hidden, weight, bias)
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    share = label_smoothing / (weight.shape[0] - 1)
    loss = (1 - label_smoothing - share) * nll - share * log_p.sum(-1)
    if unlikelihood_epsilon is not None:
        loss = -(1 - (-nll).exp() + unlikelihood_epsilon).log()
    return loss.where(targets != IGNORE, 0), logits.argmax(-1) == targets


def inputs(rows, width, vocab_size, has_bias=True, ignored=(), dtype=torch.float64):
    """Leaves whose most probable token is the target in about every second row."""
    generator = torch.Generator().manual_seed(rows + width + vocab_size)
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    hidden[::2] += 3 * weight[targets[::2]]
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64) if has_bias else None
    for row in ignored:
        targets[row] = IGNORE
    leaves = [None if x is None else x.to(dtype) for x in (hidden / width**0.5, weight, bias)]
    return [None if x is None else x.requires_grad_() for x in leaves], targets


def copies(leaves, dtype):
    return [None if x is None else x.detach().to(dtype).requires_grad_() for x in leaves]


def gradients(loss, upstream, leaves):
    return torch.autograd.grad((loss * upstream).sum(), [x for x in leaves if x is not None])


@pytest.mark.parametrize(
    "impl, chunk_logits",
    [("plain", 1), ("reference", op.CHUNK_LOGITS), ("reference", 130), ("reference", 1)],
    ids=["plain", "all", "chunks", "rows"],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "rows, width, vocab_size, has_bias, ignored",
    [
        (7, 5, 13, True, (0, 6)),
        (7, 5, 13, False, ()),
        (16, 8, 32, True, ()),
        (33, 17, 65, False, range(20)),
        (1, 3, 2, True, ()),
        (4, 3, 11, True, range(4)),
    ],
)
def test_values_and_gradients_equal_the_formula(
    monkeypatch, impl, chunk_logits, options, rows, width, vocab_size, has_bias, ignored
):
    """float64 to rounding; float32 to its own."""
    monkeypatch.setattr(op, "CHUNK_LOGITS", chunk_logits)
    leaves, targets = inputs(rows, width, vocab_size, has_bias, ignored)
    want, want_correct = formula(*leaves, targets, **options)
    upstream = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want_gradients = gradients(want, upstream, leaves)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        hidden, weight, bias = single = copies(leaves, dtype)
        got = linear_cross_entropy(hidden, weight, targets, bias_V=bias, impl=impl, **options)
        assert got.loss.dtype == dtype and got.correct.dtype == torch.bool
        assert torch.equal(got.correct, want_correct)
        torch.testing.assert_close(got.loss.double(), want, rtol=tolerance, atol=tolerance)
        got_gradients = gradients(got.loss, upstream.to(dtype), single)
        for a, b in zip(got_gradients, want_gradients, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_by_hand():
    """Two words with logits ln 3 and 0: probabilities 3/4 and 1/4."""
    hidden, weight = torch.tensor([[math.log(3.0)]] * 3), torch.tensor([[1.0], [0.0]])
    targets = torch.tensor([0, 1, IGNORE])
    loss, correct = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3), math.log(4), 0.0]))
    assert correct.tolist() == [True, False, False]
    loss, _ = linear_cross_entropy(hidden, weight, targets, unlikelihood_epsilon=0.01)
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.26), -math.log(0.76), 0.0]))
    weighted, _ = linear_cross_entropy(
        hidden, weight, targets, token_weight_N=torch.tensor([2.0, 0.5, 7.0])
    )
    torch.testing.assert_close(weighted, torch.tensor([2 * math.log(4 / 3), math.log(4) / 2, 0.0]))


def test_weights_scale_losses_and_gradients_and_have_their_own():
    leaves, targets = inputs(9, 4, 12, ignored=(2,))
    hidden, weight, bias = leaves
    factor = torch.rand(9, dtype=torch.float64).requires_grad_()
    want = formula(*leaves, targets)[0] * factor
    got = linear_cross_entropy(hidden, weight, targets, bias_V=bias, token_weight_N=factor).loss
    torch.testing.assert_close(got, want)
    upstream = torch.randn(9, dtype=torch.float64)
    got_gradients = gradients(got, upstream, [*leaves, factor])
    for a, b in zip(got_gradients, gradients(want, upstream, [*leaves, factor]), strict=True):
        torch.testing.assert_close(a, b)


def test_leading_dimensions_are_kept():
    leaves, targets = inputs(12, 4, 9, ignored=(5,))
    hidden, weight, bias = leaves
    flat = linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    grid = linear_cross_entropy(hidden.view(3, 4, 4), weight, targets.view(3, 4), bias_V=bias)
    assert grid.loss.shape == grid.correct.shape == (3, 4)
    assert torch.equal(grid.loss.flatten(), flat.loss)
    assert torch.equal(grid.correct.flatten(), flat.correct)


def test_no_rows_have_no_loss():
    leaves, targets = inputs(0, 4, 9)
    loss, correct = linear_cross_entropy(leaves[0], leaves[1], targets, bias_V=leaves[2])
    assert loss.shape == correct.shape == (0,)
    for gradient, leaf in zip(gradients(loss, loss.detach(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_half_precision_errs_no_more_than_the_formula_in_it(monkeypatch, dtype, options):
    """Truth: float64 of the same rounded inputs. The rule of every kernel: twice eager's error."""
    monkeypatch.setattr(op, "CHUNK_LOGITS", 7 * 100)
    leaves, targets = inputs(30, 24, 100, ignored=(3,), dtype=dtype)
    truth_leaves = copies(leaves, torch.float64)
    truth, _ = formula(*truth_leaves, targets, **options)
    truth_gradients, truth = gradients(truth, 1.0, truth_leaves), truth.detach()

    def errors(loss, own):
        yield float((loss.detach().double() - truth).abs().max())
        for a, b in zip(gradients(loss, 1.0, own), truth_gradients, strict=True):
            assert a.dtype == dtype
            yield float((a.double() - b).norm() / b.norm())

    eager_leaves, own = copies(leaves, dtype), copies(leaves, dtype)
    logits = F.linear(*eager_leaves).float()
    eager, _ = formula(logits, torch.eye(100), None, targets, **options)
    got = linear_cross_entropy(own[0], own[1], targets, bias_V=own[2], **options)
    assert got.loss.dtype == torch.float32
    for ours, theirs in zip(errors(got.loss, own), errors(eager, eager_leaves), strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unlikelihood_of_a_certain_token_keeps_its_digits(dtype):
    """Target's logit is g above one other: 1 - p = 1 / (1 + e^g), which 1 - softmax rounds to 0."""
    gaps, epsilon = torch.tensor([8.0, 17.0, 24.0, 60.0]), 1e-9
    hidden = gaps.to(dtype).unsqueeze(1).requires_grad_()
    weight = torch.tensor([[1.0], [0.0]], dtype=dtype)
    targets = torch.zeros(4, dtype=torch.int64)
    loss, _ = linear_cross_entropy(hidden, weight, targets, unlikelihood_epsilon=epsilon)
    others = 1 / (1 + gaps.double().exp())
    torch.testing.assert_close(loss.double(), -(others + epsilon).log(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    want = (1 - others) * others / (others + epsilon)
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.squeeze(1).double(), want, rtol=rtol, atol=0)


def test_autocast_projects_in_half_precision_and_gradients_keep_their_type():
    (hidden, weight, bias), targets = inputs(6, 8, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets, bias_V=bias).loss
    halves = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    want = linear_cross_entropy(halves[0], halves[1], targets, bias_V=halves[2]).loss
    assert got.dtype == torch.float32 and torch.equal(got, want)
    for gradient in gradients(got, 1.0, (hidden, weight, bias)):
        assert gradient.dtype == torch.float32


def test_it_compiles_in_one_graph():
    (hidden, weight, bias), targets = inputs(6, 8, 20, ignored=(2,))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    want = linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    got = compiled(hidden, weight, targets, bias_V=bias)
    torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(got.correct, want.correct)


def test_only_what_needs_a_gradient_gets_one():
    (hidden, weight, bias), targets = inputs(6, 8, 20)
    want = gradients(formula(hidden, weight, bias, targets)[0], 1.0, [hidden])[0]
    weight, bias = weight.detach(), bias.detach()
    loss = linear_cross_entropy(hidden, weight, targets, bias_V=bias).loss
    torch.testing.assert_close(gradients(loss, 1.0, [hidden])[0], want)
    assert not linear_cross_entropy(hidden.detach(), weight, targets).loss.requires_grad


def test_autocast_takes_weight_and_bias_of_several_types():
    """Oracle: PyTorch's linear layer and cross-entropy in autocast."""
    (hidden, weight, bias), targets = inputs(30, 8, 50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets, bias_V=bias.bfloat16()).loss
        want = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"unlikelihood_epsilon": 0.01}])
def test_a_second_pass_and_few_rows_at_a_time_change_nothing(monkeypatch, options):
    """Oracle: one pass over all rows at a time; going back writes over the kept logits."""
    (hidden, weight, bias), targets = inputs(30, 8, 50, dtype=torch.float32)
    given = [hidden, weight, bias]
    alone = linear_cross_entropy(hidden, weight, targets, bias_V=bias, **options).loss
    want = torch.autograd.grad(alone.sum(), given)
    monkeypatch.setattr(op, "CHUNK_LOGITS", 16 * 50)
    monkeypatch.setattr(linear_cross_entropy_rows, "CACHED_LOGITS", 3 * 50)
    loss = linear_cross_entropy(hidden, weight, targets, bias_V=bias, **options).loss
    assert torch.equal(loss, alone)
    for _ in range(2):
        got = torch.autograd.grad(loss.sum(), given, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_a_second_pass_over_logits_kept_in_bfloat16_changes_nothing():
    (hidden, weight, bias), targets = inputs(30, 8, 50, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, bias_V=bias).loss.sum()
    first, second = (
        torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_the_graph_keeps_one_chunk_of_logits_at_most(monkeypatch):
    """64 rows of 1,000 words in chunks of 8: an eighth of the logits, and what comes in."""
    monkeypatch.setattr(op, "CHUNK_LOGITS", 8 * 1000)
    (hidden, weight, bias), targets = inputs(64, 4, 1000, dtype=torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    incoming = sum(x.untyped_storage().nbytes() for x in (hidden, weight, bias, targets))
    assert sum(kept.values()) <= incoming + 8 * 1000 * 4 + 64 * (3 * 4 + 1)


def test_chunks_are_larger_on_gpus():
    """Of 32k words 1,024 rows on the CPU and 2,048 on a GPU, whose tensors need no names."""
    with FakeTensorMode():
        steps = [next(op.chunks(1, torch.empty(2**15, 1, device=x))).stop for x in ("cpu", "cuda")]
    assert steps == [1024, 2048]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"impl": "fast"}, "'fast'.*'reference'"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"unlikelihood_epsilon": 0.0}, "unlikelihood_epsilon is 0.0"),
        ({"unlikelihood_epsilon": 0.01, "label_smoothing": 0.1}, "use one of them"),
        ({"target_ids_N": torch.tensor([1, 5, 2])}, "target 5.*vocabulary of 5"),
        ({"target_ids_N": torch.tensor([1, -1, 2])}, "target -1.*ignore_index is -100"),
        ({"target_ids_N": torch.tensor([1, 2])}, r"\(3, 4\).*\(2,\)"),
        ({"weight_VD": torch.zeros(5, 3)}, r"\(3, 4\), weight \(5, 3\)"),
        ({"weight_VD": torch.zeros(5, 4).double()}, "float32, torch.float64.*cast"),
        ({"bias_V": torch.zeros(4)}, r"bias has shape \(4,\); use \(5,\)"),
        ({"token_weight_N": torch.zeros(1)}, r"\(1,\).*\(3,\)"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    given = {"hidden_ND": torch.zeros(3, 4), "weight_VD": torch.zeros(5, 4)}
    given["target_ids_N"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**given, **change})
