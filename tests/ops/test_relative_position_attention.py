"""The operation against its formula in float64, and the fused model against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from metro.fusion import fuse, fused_attend
from metro.modeling.attention_metro_t5 import Attention, bias_of_pairs
from metro.modeling.layers_metro_t5 import FeedForward
from metro.ops import cached_attention
from metro.ops.dropout import draw_kept
from metro.ops.relative_position_attention import relative_position_attention
from metro.pretraining.losses import MetroObjective
from tests.pretraining.test_model import batch, build


def formula(q, k, v, bias, key_mask, is_causal, positions, dropped=None, dropout=0.0):
    """The docstring's formula, one pair at a time for bias and visibility."""
    batch_size, _, num_queries, width = q.shape
    num_keys = k.shape[2]
    if positions is None:
        positions = torch.arange(num_keys - num_queries, num_keys).expand(batch_size, -1)
    keys = torch.arange(num_keys)
    distance = keys - positions.unsqueeze(-1)
    scores = q @ k.transpose(-1, -2) / width**0.5
    if bias is not None:
        scores = scores + bias[:, distance + num_keys - 1].transpose(0, 1)
    visible = torch.ones(batch_size, num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        visible &= distance <= 0
    if key_mask is not None:
        visible &= key_mask.unsqueeze(1)
    weights = scores.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1)
    if dropped is not None:
        weights = weights.masked_fill(dropped, 0.0) / (1 - dropout)
    return weights @ v


def inputs(num_queries, num_keys, has_bias, masked, positions, heads=6, width=8):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q = draw(3, num_queries, heads, width).transpose(1, 2)
    k, v = (draw(3, num_keys, heads, width).transpose(1, 2) for _ in range(2))
    bias = draw(heads, 2 * num_keys - 1) if has_bias else None
    key_mask = torch.arange(num_keys) < torch.tensor([[num_keys], [num_keys - 2], [3]])
    chosen = torch.stack([torch.randperm(num_keys, generator=generator) for _ in range(3)])
    chosen = chosen[:, :num_queries] if positions else None
    return q, k, v, bias, key_mask if masked else None, chosen


@pytest.mark.parametrize("impl", ["reference", "cached"])
@pytest.mark.parametrize("num_queries, num_keys", [(16, 16), (5, 13), (1, 13)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal, positions", [(False, False), (True, False), (True, True)])
def test_values_and_gradients_equal_the_formula(
    impl, num_queries, num_keys, has_bias, masked, is_causal, positions
):
    q, k, v, bias, key_mask, chosen = inputs(num_queries, num_keys, has_bias, masked, positions)
    leaves = [x for x in (q, k, v, bias) if x is not None]
    want = formula(q, k, v, bias, key_mask, is_causal, chosen)
    single = [None if x is None else x.detach().float().requires_grad_() for x in (q, k, v, bias)]
    got = relative_position_attention(
        *single, key_mask=key_mask, is_causal=is_causal, query_positions=chosen, impl=impl
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    weights = torch.randn(want.shape, dtype=torch.float64)
    want_grads = torch.autograd.grad((want * weights).sum(), leaves)
    got_grads = torch.autograd.grad(
        (got * weights.float()).sum(), [x for x in single if x is not None]
    )
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_causal_blocks_equal_the_formula(monkeypatch):
    """Blocks that do not divide the length."""
    monkeypatch.setattr(cached_attention, "CAUSAL_BLOCK", 7)
    test_values_and_gradients_equal_the_formula("cached", 16, 16, True, True, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_equals_the_formula_on_the_same_dropped_weights(monkeypatch, dtype):
    """The kept weights are recorded as they are drawn."""
    drawn = []

    def recording(*args):
        drawn.append(draw_kept(*args))
        return drawn[-1].clone()

    monkeypatch.setattr(cached_attention, "draw_kept", recording)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # head after head
    *exact, bias, key_mask, _ = inputs(16, 16, True, True, False)
    given = [x.detach().to(dtype).requires_grad_() for x in exact]
    given.append(bias.detach().float().requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in given]
    got = relative_position_attention(*given, key_mask=key_mask, dropout=0.25, impl="cached")
    dropped = torch.stack(drawn).view(6, 3, 16, 16).transpose(0, 1) == 0
    assert 0.2 < dropped.float().mean() < 0.3
    want = formula(*exact, key_mask, False, None, dropped, 0.25)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (3e-2, 3e-2)
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    rtol = max(rtol, 1e-4)
    pairs = zip(gradients_of(got, given), gradients_of(want, exact), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    """Bit for bit, dropout included."""
    q, k, v, bias, key_mask, _ = inputs(16, 16, True, True, False)
    single, found = [x.detach().float().requires_grad_() for x in (q, k, v, bias)], []
    for num_threads in (1, 3, 12):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        torch.manual_seed(0)
        got = relative_position_attention(*single, key_mask, dropout=0.25, impl="cached")
        found.append((got, *torch.autograd.grad(got.square().sum(), single)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_a_seeded_run_drops_the_same_weights_and_an_unseeded_one_others():
    x = torch.randn(1, 4, 64, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(relative_position_attention(x, x, x, dropout=0.5, impl="cached"))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_fuse_reaches_every_attention():
    model = fuse(build())
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(attentions) == 7  # auxiliary 1, encoder 2, decoder 2 x 2
    assert all(module.attend is fused_attend for module in attentions)


def test_fused_feed_forward_leaves_replaced_layers_to_pytorch():
    """An adapter's layer in the place of a linear one is called, not looked into."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = FeedForward(build().config)
    plain.wo = Doubled(plain.wo.in_features, plain.wo.out_features)
    x = torch.randn(2, 3, plain.wi.in_features)
    want = plain(x)
    torch.testing.assert_close(fuse(plain)(x), want)


def test_a_fused_model_trains_under_autocast(monkeypatch):
    """Oracle: the plain model under autocast, which rounds at the same places: with AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    losses = []
    for model in (build(), fuse(build())):
        randomize(model)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**batch(), objective=MetroObjective()).total)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])


def test_a_fused_model_compiles_in_one_graph():
    model, inputs = fuse(build()).eval(), batch()
    extra = {"objective": MetroObjective(), "max_masked": 9, "has_padding": True}
    want = model(**inputs, **extra).total
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, **extra).total, want, rtol=1e-5, atol=1e-5)


def randomize(model):
    """Fresh relative bias tables and RTD heads are zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradients_of(out, leaves):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * upstream).sum(), leaves)]


def test_the_gradient_of_a_bfloat16_bias_sums_sequences_in_float32():
    """Oracle: autograd through the formula in float64; in bfloat16 1,000 sums would lose 4 %."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 1, 8, 4)] * 3 + [(1, 15)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    exact = [x.double().requires_grad_() for x in given]
    given = [x.requires_grad_() for x in given]
    *_, want = gradients_of(formula(*exact, None, False, None), exact)
    *_, got = gradients_of(relative_position_attention(*given, impl="cached"), given)
    assert (got.double() - want).norm() < 0.01 * want.norm()


def test_dropped_weights_are_kept_where_checkpointing_finds_them():
    """Beside the inputs a bit per weight, by way of the hooks of saved tensors."""
    q, k, v, *_ = inputs(16, 16, False, False, False)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        relative_position_attention(q, k, v, dropout=0.25, impl="cached")
    (bits,) = (x for x in kept if x.dtype == torch.uint8)
    assert bits.numel() == 6 * 3 * 16 * 16 // 8 and len(kept) == 4


@pytest.mark.parametrize("is_causal", [False, True])
def test_products_of_bfloat16_err_no_more_than_pytorchs(is_causal):
    """Oracle: the formula in float64, and the errors of PyTorch's own attention in bfloat16."""
    q, k, v, bias, key_mask, _ = inputs(160, 160, True, True, False)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (q, k, v)]
    exact.append(bias.detach().float().double().requires_grad_())
    want = gradients_of(formula(*exact, key_mask, is_causal, None), exact)
    errors = {}
    for impl in ("cached", "reference"):
        given = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
        given.append(bias.detach().float().requires_grad_())
        out = relative_position_attention(*given, key_mask=key_mask, is_causal=is_causal, impl=impl)
        assert out.dtype == torch.bfloat16
        got = gradients_of(out, given)
        pairs = zip(got, want, strict=True)
        errors[impl] = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    for ours, theirs in zip(errors["cached"], errors["reference"], strict=True):
        assert ours < 2 * theirs < 0.05  # as kernels have to prove on a GPU


@pytest.mark.parametrize("in_autocast", [False, True])
@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("given", [(), ("bias",), ("bias", "gradient"), ("dropout",)])
def test_pytorchs_attention_takes_bfloat16_where_it_is_not_float32_rounded(
    monkeypatch, in_autocast, has_amx, given
):
    """Flash attention in bfloat16 is that on CPUs with AMX alone; dropout, and a bias with a
    gradient, are not flash attention. Oracle: PyTorch's in float32, rounded once.
    """
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    exact, types_seen = F.scaled_dot_product_attention, []

    def attention(q, k, v, mask=None, dropout=0.0):
        types_seen.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else q.dtype)
        return exact(q, k, v, mask, dropout)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    dtype = torch.float32 if in_autocast else torch.bfloat16
    q, k, v, bias, key_mask, _ = inputs(16, 16, "bias" in given, True, False)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    if bias is not None:
        bias = bias.detach().to(dtype).requires_grad_("gradient" in given)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_autocast):
        out = relative_position_attention(
            q, k, v, bias, key_mask, dropout=0.1 * ("dropout" in given), impl="reference"
        )
    takes_flash = given in ((), ("bias",))
    assert types_seen == [torch.float32 if takes_flash and not has_amx else torch.bfloat16]
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert {grad.dtype for grad in grads} == {dtype}
    if takes_flash:
        masked = key_mask[:, None, None, :]
        if bias is not None:
            pairs = bias_of_pairs(bias.float(), 16)
            masked = pairs.masked_fill(~masked, torch.finfo(torch.bfloat16).min)
        expected = exact(q.float(), k.float(), v.float(), masked)
        assert has_amx or torch.equal(out, expected.bfloat16())
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
