"""The operation against its formula in float64, and fairseq's optimiser with it against its own."""

import copy

import pytest
import torch

from metro.ops.adamw import adamw_step

SETTINGS = dict(lr=0.01, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1)


def formula(p, g, m, v, step, lr, betas, eps, weight_decay):
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    rate = lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    return p - lr * weight_decay * p - rate * m / (v**0.5 + eps), m, v


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_steps_equal_the_formula(impl):
    """Ten of them, with an epsilon of the size of the gradients: where it is added shows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    truth = [[torch.randn(s, generator=generator).double() for s in shapes]]
    truth += [[torch.zeros(s).double() for s in shapes] for _ in range(2)]
    params, exp_avgs, exp_avg_sqs = ([x.float() for x in xs] for xs in truth)
    for step in range(1, 11):
        grads = [torch.randn(s, generator=generator) * 1e-3 for s in shapes]
        adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, impl=impl, **SETTINGS)
        each = (
            formula(p, g.double(), m, v, step, **SETTINGS)
            for p, g, m, v in zip(truth[0], grads, *truth[1:], strict=True)
        )
        truth = list(zip(*each, strict=True))
    for got, want in zip((params, exp_avgs, exp_avg_sqs), truth, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


def test_no_parameters_are_no_error():
    adamw_step([], [], [], [], 1, **SETTINGS)


def test_unknown_impl_names_the_valid_ones():
    with pytest.raises(ValueError, match="'fast'.*'fused'"):
        adamw_step([], [], [], [], 1, impl="fast", **SETTINGS)


@pytest.mark.fairseq
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fairseqs_optimiser_takes_the_steps_of_its_own(dtype):
    """Also going on from its state; half precision goes the old way, with float32 moments."""
    from fairseq.optim.adam import Adam

    from fairseq_plugins.adam import FusedAdam

    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator).to(dtype) for s in ((4, 3), (6,), (2,))]
    groups = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    theirs, ours = Adam(groups[0], **SETTINGS), FusedAdam(groups[1], **SETTINGS)
    ours.fused_devices = ("cpu",)  # where this test runs
    for step in range(6):
        if step == 3:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for own, other in zip(*groups, strict=True):
            own.grad = torch.randn(own.shape, generator=generator).to(dtype)
            if step == 4 and own.dim() == 2:  # lies in memory otherwise than its parameter
                own.grad = own.grad.T.contiguous().T
            other.grad = own.grad.clone()
        groups[0][2].grad = groups[1][2].grad = None  # not part of the loss
        theirs.step()
        ours.step()
        for own, other in zip(*groups, strict=True):
            torch.testing.assert_close(other, own, rtol=1e-5, atol=1e-6)
    assert [s["step"] for s in ours.state.values()] == [6, 6]
    assert {type(x) for s in ours.state.values() for x in s.values()} == {int, torch.Tensor}
