"""Kernels on trial: right ones pass, and ones broken on purpose are caught, each for its reason.

Oracle: what was broken. In Triton's interpreter; the rule for errors is that of the kernels' tests.
"""

import logging

import pytest
import torch

from tests.ops.triton_tests import HAS_GPU, INTERPRETED, assert_passes_in_the_interpreter

triton = pytest.importorskip("triton", reason="needs the package triton")
import triton.language as tl  # noqa: E402

from metro.ops.kernels import (  # noqa: E402
    attention_backward,
    attention_forward,
    attention_tiles,
    dropout_add_layer_norm,
    linear_cross_entropy,
    relative_position_attention,
    self_check,
    trials,
)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
CPU = torch.device("cpu")
ATTENTION = ("relative_position_attention", CPU, torch.float16, 32, ("dropout", "mask"))
RIGHT = [
    ("relative_position_attention", CPU, torch.float16, 32, ("bias", "dropout", "mask")),
    ("dropout_add_layer_norm", CPU, torch.float16, 24, ("dropout", "mixed")),
    ("linear_cross_entropy", CPU, torch.float16, 24, ("bias",)),
    ("linear_sample_cross_entropy", CPU, torch.float32, 24, ("bias",)),
]


@triton.jit
def with_wrong_sign(scores, grad_weights, lse, delta, kept, kept_scale):
    weights = tl.exp2(scores - lse)
    grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
    return tl.where(kept, weights * kept_scale, 0.0), weights * (delta - grad_weights)


@triton.jit
def dropping_half(of_queries, of_keys, threshold):
    x = of_queries + of_keys
    return (x ^ (x >> 16)) * 0x85EBCA6B >= 0x80000000


@triton.jit
def without_noise(tokens, streams):
    return tokens[None, :] * 0.0 + tl.zeros_like(streams)[:, None].to(tl.float32)


class Unbuildable:
    def __getitem__(self, grid):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")


def spoiling_forward(monkeypatch, spoil):
    forward = relative_position_attention.attention_forward

    def spoiled(*given):
        out, lse = forward(*given)
        spoil(out)
        return out, lse

    monkeypatch.setattr(relative_position_attention, "attention_forward", spoiled)


def wrong_sign(monkeypatch):
    monkeypatch.setattr(attention_backward, "finish_gradients", with_wrong_sign)


def wrong_share(monkeypatch):
    for module in (attention_forward, attention_tiles, attention_backward):
        monkeypatch.setattr(module, "are_kept", dropping_half)


def inconsistent_drops(monkeypatch):
    monkeypatch.setattr(attention_backward, "are_kept", dropping_half)


def no_number_in_one_row(monkeypatch):
    spoiling_forward(monkeypatch, lambda out: out[1, 1, 69].fill_(torch.nan))


def one_number_off(monkeypatch):
    spoiling_forward(monkeypatch, lambda out: out[0, 1, 69, 3].mul_(1.5))


def other_bits_each_time(monkeypatch):
    counter = iter(range(1, 10**6))
    spoiling_forward(monkeypatch, lambda out: out[0, 0, 0].mul_(1.0 + 2.0**-10 * next(counter)))


def no_compiler(monkeypatch):
    monkeypatch.setattr(relative_position_attention, "forward_kernel", Unbuildable())


FAULTS = {
    wrong_sign: "gradient of k has an error of",
    wrong_share: "draws have wrong shares",
    inconsistent_drops: "gradient of k has an error of",
    no_number_in_one_row: "output 0 is not finite",
    one_number_off: "output 0 has an error of",
    other_bits_each_time: "output 0 differs from run to run",
    no_compiler: "cannot be built or launched: RuntimeError: Failed to find C compiler.",
}


@pytest.fixture(autouse=True)
def fewer_keys(monkeypatch):
    """The interpreter takes long for each tile."""
    monkeypatch.setattr(trials, "KEYS", 130)


@interpreted
@pytest.mark.parametrize("case", RIGHT, ids=[case[0] for case in RIGHT])
def test_right_kernels_pass(case):
    assert self_check.find_fault(*case) is None


@interpreted
@pytest.mark.parametrize("break_it", FAULTS, ids=[break_it.__name__ for break_it in FAULTS])
def test_a_broken_kernel_is_caught_with_the_reason(monkeypatch, break_it):
    break_it(monkeypatch)
    assert FAULTS[break_it] in str(self_check.find_fault(*ATTENTION))


@interpreted
@pytest.mark.parametrize(
    "module, name, case, fault",
    [
        (relative_position_attention, "bias_gradient", RIGHT[0], "gradient of bias has an error"),
        (linear_cross_entropy, "logits_gradient_of_rows", RIGHT[2], "has an error of"),
    ],
    ids=["bias", "logits"],
)
def test_a_wrong_gradient_is_caught(monkeypatch, module, name, case, fault):
    """A tenth too large."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: right(*given) * 1.1)
    assert fault in str(self_check.find_fault(*case))


@interpreted
def test_a_small_number_among_large_ones_is_compared_with_itself(monkeypatch):
    """15 % off at an eighth of the largest of 768 gradients: 0.2 % of their norm."""
    backward = dropout_add_layer_norm.normalise_backward

    def spoiled(*given):
        grads = backward(*given)
        sizes = grads[2].abs()
        grads[2][(sizes - sizes.max() / 8).abs().argmin()] *= 1.15
        return grads

    case = ("dropout_add_layer_norm", CPU, torch.float16, 768, ("dropout",))
    assert self_check.find_fault(*case) is None
    monkeypatch.setattr(dropout_add_layer_norm, "normalise_backward", spoiled)
    assert "gradient of weight has an error of" in str(self_check.find_fault(*case))


def test_errors_are_those_of_rows_and_of_numbers_of_a_vector():
    """Oracle: by hand. Nothing is divided by less than half of the largest."""
    truth = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    for row, error in ((0, 0.02), (1, 0.04), (2, 0.04)):
        x = truth.clone()
        x[row, 0] += 0.1
        assert self_check.row_error(x, truth.double()) == pytest.approx(error, rel=1e-6)
    assert self_check.row_error(torch.tensor([8.0, 2.2]), torch.tensor([8.0, 2.0])) == (
        pytest.approx(0.05, rel=1e-6)
    )


@interpreted
def test_wrong_draws_of_the_other_kernels_are_caught(monkeypatch):
    """A layer's end that drops half, and a sampler that takes the most probable token."""
    dropping = dropout_add_layer_norm.dropping
    monkeypatch.setattr(dropout_add_layer_norm, "dropping", lambda p: dropping(0.5))
    assert "output 0 has an error of" in str(self_check.find_fault(*RIGHT[1]))
    monkeypatch.setattr(linear_cross_entropy, "gumbel", without_noise)
    assert "wrong shares" in str(self_check.find_fault(*RIGHT[3]))


@interpreted
def test_a_kernel_is_tried_once_and_distrusted_with_one_warning(monkeypatch, caplog):
    """The caller's random numbers, inference mode and autocast are as they were."""
    monkeypatch.setattr(self_check, "_faults", {})
    no_compiler(monkeypatch)
    torch.manual_seed(3)
    want, tries = torch.rand(2), []
    find_fault = self_check.find_fault
    monkeypatch.setattr(self_check, "find_fault", lambda *x: tries.append(x) or find_fault(*x))
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING), torch.inference_mode(), torch.autocast("cpu"):
        for width in (32, 32, 64):
            op, device, dtype, _, flags = ATTENTION
            assert not self_check.is_trusted(op, device, dtype, width, flags)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.rand(2), want)
    assert [tried[3] for tried in tries] == [32, 64]
    [record] = caplog.records
    assert "is not used on cpu for float16 of width 32: it cannot be built" in record.getMessage()
    assert "PyTorch's operation takes its place" in record.getMessage()


def test_without_a_measurement_benchmarks_take_kernels_that_prove_themselves(monkeypatch):
    """Oracle: by hand; the faults of the others are listed."""
    from benchmarks.timing import take_proven_kernels
    from metro.ops import dispatch

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(self_check, "_faults", {})
    monkeypatch.setattr(
        self_check, "find_fault", lambda op, *case: "wrong" if op == "loss" else None
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "measured_gain", dispatch.measured_gain)  # and back
    monkeypatch.setenv("METRO_TRITON", "0")
    assert not dispatch.takes_kernel("attention", gpu, torch.bfloat16, 64, "mask")
    take_proven_kernels()
    assert dispatch.takes_kernel("attention", gpu, torch.bfloat16, 64, "mask")
    assert not dispatch.takes_kernel("loss", gpu, torch.bfloat16, 64, "bias")
    assert self_check.known_faults() == ["loss bfloat16 bias: wrong"]


@interpreted
def test_a_kernel_can_be_tried_while_the_compiler_traces(monkeypatch):
    """As `takes_kernel` asks."""
    monkeypatch.setattr(self_check, "_faults", {})
    op, device, dtype, width, flags = RIGHT[1]
    ask = torch.compiler.assume_constant_result(self_check.is_trusted)

    def step(x):
        return x + (2.0 if ask(op, device, dtype, width, flags) else 1.0)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert compiled(torch.zeros(1, requires_grad=True)).item() == 2.0


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the tests above run as they are")
def test_trials_pass_in_the_interpreter():
    """The tests above, in a process that imports Triton with its interpreter."""
    assert_passes_in_the_interpreter(__file__, timeout=600)
