"""Where the time goes. Oracle: multiplications, additions and bytes counted by hand."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import time_by_part
from benchmarks.time_by_part import by_part, parts_of
from metro.ops.cached_attention import CachedAttention
from metro.ops.dropout import dropout
from metro.ops.linear import linear


def test_products_belong_to_the_part_that_called_them():
    x_TD, w_ED, b_E = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    q_BHTK, k_BHSK, v_BHSK = torch.randn(2, 6, 3, 8), *torch.randn(2, 2, 6, 7, 8)

    def run() -> None:
        F.linear(x_TD, w_ED)
        F.linear(x_TD, w_ED, b_E)
        linear(x_TD.bfloat16(), w_ED.bfloat16())
        F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK)
        with record_function("optimizer"):
            x_TD.add(1) @ x_TD.T
        F.layer_norm(x_TD, (4,))
        x_TD.exp()

    with torch.inference_mode():
        parts = by_part(run)
    flops = {part: sums.flops for part, sums in parts.items()}
    assert flops == {
        "products": 3 * (2 * 3 * 4 * 5),
        "attention": 2 * (2 * 2 * 6 * 3 * 7 * 8),
        "optimizer": 2 * 3 * 4 * 3,
        "LayerNorm": 0,
        "the rest": 0,
        "outside of PyTorch": 0,
    }
    assert all(sums.seconds > 0 for sums in parts.values())
    for part, sums in parts.items():
        assert (0 < sums.in_products <= sums.seconds) if flops[part] else not sums.in_products
    assert parts["optimizer"].in_products < parts["optimizer"].seconds
    assert parts["LayerNorm"].moved == 2 * 3 * 4 * 4


def test_the_way_back_belongs_to_the_same_part(monkeypatch):
    """CachedAttention has two products forward and five backward, one is the scores' once more;
    PyTorch's attention with the gradient of a bias two and four; a linear layer one and two.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q, k, v = torch.randn(3, 1, 2, 32, 8, requires_grad=True).unbind()
    bias = torch.randn(1, 2, 32, 32, requires_grad=True)
    norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8, bias=False)
    of_product, of_linear = 2 * (2 * 32 * 32 * 8), 2 * (2 * 32) * 8 * 8

    def run(attention) -> None:
        linear(norm(attention(q, k, v))).sum().backward()

    def cached(q, k, v):
        return CachedAttention.apply(q, k, v, None, None, False, None, 0.0)

    for attention, num_products in (
        (cached, 7),
        (partial(F.scaled_dot_product_attention, attn_mask=bias), 6),
    ):
        parts = by_part(partial(run, attention))
        assert parts["attention"].flops == num_products * of_product
        assert parts["products"].flops == 3 * of_linear
        assert parts["LayerNorm"].moved == (2 + 3) * 2 * 32 * 8 * 4
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        norm(torch.randn(8, 8)).exp().sum().backward()
    of_name = {event.name: part for event, part in parts_of(profiler)}
    assert of_name["aten::native_layer_norm_backward"] == "LayerNorm"
    assert of_name["aten::exp"] == "the rest"


def test_floors_are_what_products_and_bytes_take(monkeypatch):
    """Oracle: by hand, at 1,000 operations and 100 bytes a second."""
    parameter = torch.nn.Parameter(torch.randn(4, 5))

    def run() -> None:
        torch.randn(3, 4) @ parameter.detach()
        with record_function("optimizer"):
            parameter.data.mul_(2)

    job = (run, time_by_part.bytes_of([parameter], 7))
    monkeypatch.setattr(time_by_part, "JOBS", {"evaluation": lambda in_bf16: job})
    monkeypatch.setattr(time_by_part, "measure_rates", lambda device: (None, 100.0))
    monkeypatch.setattr(time_by_part.evaluation, "product_speed", lambda *given: 1000.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    rows = {row["part"]: row for row in time_by_part.measure("evaluation", in_bf16=False)}
    assert rows["products"]["floor s"] == 2 * 3 * 4 * 5 / 1000
    assert rows["optimizer"]["floor s"] == 7 * 4 * 4 * 5 / 100
    assert rows["optimizer"]["in products s"] is None is rows["the rest"]["floor s"]
    assert rows["all"]["floor s"] == pytest.approx(0.12 + 5.6)
    parts = [row for part, row in rows.items() if part != "all"]
    for key in ("seconds", "share"):
        assert rows["all"][key] == pytest.approx(sum(row[key] for row in parts))


def test_dropout_moves_what_it_reads_and_writes():
    """Oracle: 5 x 16 numbers of 2 bytes in and out of dropout, and the same of their gradients."""
    x_TD = torch.randn(5, 16).bfloat16().requires_grad_()
    parts = by_part(lambda: dropout(x_TD, 0.5, impl="bits").sum().backward())
    assert parts["dropout"].moved == 4 * 5 * 16 * 2 and not parts["dropout"].flops
