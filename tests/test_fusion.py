"""A fused model beside the plain one: same keys, same numbers, whatever is done to the weights.

Oracle: the plain model. Autocast and the compiler are tested with the attention in
`tests/ops/test_relative_position_attention.py`.
"""

import copy

import pytest
import torch

from metro.fusion import fuse
from metro.modeling.attention_metro_t5 import Attention
from metro.modeling.layers_metro_t5 import AttentionLayer
from metro.ops import linear, relative_position_attention
from metro.pretraining.losses import MetroObjective
from tests.ops.test_relative_position_attention import randomize
from tests.pretraining.test_model import batch, build


@pytest.fixture(params=["summed", "packed"])
def impl(request, monkeypatch) -> str:
    """How projections are computed: on the CPU the first, on GPUs with enough rows the second.

    Attention is that of long sequences.
    """
    monkeypatch.setattr(relative_position_attention, "SHORT", 0)
    monkeypatch.setattr(linear, "best_impl", lambda x, num_layers: request.param)
    return request.param


def loss_of(model) -> torch.Tensor:
    return model(**batch(), objective=MetroObjective()).total


def plain_and_fused():
    plain = build()
    randomize(plain)
    return plain, fuse(copy.deepcopy(plain))


def same(a, b, **tolerance) -> None:
    torch.testing.assert_close(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def test_losses_and_gradients_are_those_of_the_plain_model(impl):
    models = plain_and_fused()
    losses = [loss_of(model) for model in models]
    same(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        if not name.endswith("k.bias"):  # zero up to rounding
            scale = float(b.grad.abs().max())
            assert scale > 0
            same(a.grad, b.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_the_graph_of_a_fused_model_is_made_of_the_fused_operations(impl):
    """And the plain model's is not: else the comparisons here would say nothing."""

    def operations(loss):
        seen, queue = set(), [loss.grad_fn]
        while queue:
            node = queue.pop()
            if node is not None and node not in seen:
                seen.add(node)
                queue += [following for following, _ in node.next_functions]
        return {type(node).__name__ for node in seen}

    plain, fused = (operations(loss_of(model)) for model in plain_and_fused())
    ours = {"PackedLinearBackward", "CachedAttentionBackward", "InPlaceFeedForwardBackward"}
    assert ours <= fused and not ours & plain


def test_keys_are_those_of_the_plain_model_and_weights_go_both_ways(impl):
    plain, fused = plain_and_fused()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    fresh = fuse(build())  # fused before it gets its weights
    fresh.load_state_dict(plain.state_dict())
    same(loss_of(fresh), loss_of(plain))
    later = build()  # and after
    later.load_state_dict(fused.state_dict())
    same(loss_of(fuse(later)), loss_of(plain))


def test_weights_that_change_are_seen(impl):
    """By an optimiser, by ``.data`` as fairseq writes them in half precision, by other storage."""
    plain, fused = plain_and_fused()
    before = float(loss_of(fused).detach())
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        model.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    same(loss_of(fused), loss_of(plain), rtol=1e-4)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if "Attention" in name and name.endswith((".q.weight", ".v.weight")):
                parameter.data.copy_(parameter.data * 2)
            elif "Attention" in name and name.endswith(".k.weight"):
                parameter.data = parameter.data * 0.5
    same(loss_of(fused), loss_of(plain), rtol=1e-4)
    assert abs(float(loss_of(fused).detach()) / before - 1) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_model_computes_in_its_type(impl, dtype):
    plain, fused = plain_and_fused()
    want, got = loss_of(plain.to(dtype)), loss_of(fused.to(dtype))
    got.backward()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    same(got, want, rtol=tolerance, atol=tolerance)
    assert all(p.grad.dtype == dtype for p in fused.parameters())


def test_hooks_of_layers_are_called():
    """Adapters and tools hook themselves in, or replace a layer's forward."""
    _, fused = plain_and_fused()
    called = []
    layers = [m for m in fused.modules() if isinstance(m, AttentionLayer)]
    attention = next(m for m in fused.modules() if isinstance(m, Attention))
    attention.k.register_forward_hook(lambda *_: called.append("hook"))
    layers[0].layer_norm.register_forward_pre_hook(lambda *_: called.append("pre-hook"))
    forward = layers[1].layer_norm.forward

    def replaced(x):
        called.append("forward")
        return forward(x)

    layers[1].layer_norm.forward = replaced
    attention.v.register_full_backward_pre_hook(lambda *_: called.append("backward pre-hook"))
    loss_of(fused).backward()
    assert set(called) == {"hook", "pre-hook", "forward", "backward pre-hook"}


def test_dropout_is_drawn_anew_and_only_in_training():
    _, fused = plain_and_fused()
    for module in fused.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.3
    drawn = [loss_of(fused) for _ in range(2)]
    assert not torch.equal(*drawn)
    fused.eval()
    assert torch.equal(loss_of(fused), loss_of(fused))
