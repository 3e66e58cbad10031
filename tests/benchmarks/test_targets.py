"""What the benchmarks say about their targets.

Oracle: by hand.
"""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ops
from benchmarks.evaluation import judge
from benchmarks.ops import judge_projection, kernel_gains
from benchmarks.pretraining import (
    LENGTH,
    SIZES,
    SPANS_LENGTH,
    VOCAB_SIZE,
    build_step,
    rows_of,
    span_flops_per_token,
    t5_batch,
)
from benchmarks.pretraining import judge as judge_pretraining
from benchmarks.pretraining_curves import failures_of
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.ops.dispatch import measured_gains
from tests.conftest import ROOT


def projection_rows(peak_mib: float) -> list[dict]:
    times = {"plain": (1, 1), "triton": (2, peak_mib), "torch.compile": (3, 5), "liger": (2, 9)}
    return [
        {"operation": "linear_cross_entropy", "impl": impl, "ms": ms, "peak MiB": peak}
        for impl, (ms, peak) in times.items()
    ]


def test_the_projection_is_judged_by_time_and_memory_of_its_rivals():
    assert judge_projection(projection_rows(5)).endswith(": met without ['cut_cross_entropy']")
    assert "NOT met" in judge_projection(projection_rows(6))


def test_the_packaged_gains_are_those_of_the_committed_measurements():
    """Oracle: by hand; the faster of PyTorch's ways counts, and a generation is a major version."""
    results = {
        "environment": {"gpus": [{"capability": "9.0"}]},
        "rows": [
            {"operation": "attention, bias mask", "impl": "reference", "ms": 3.0},
            {"operation": "attention, bias mask", "impl": "triton", "ms": 2.0},
            {"operation": "loss", "impl": "plain", "ms": 4.0},
            {"operation": "loss", "impl": "reference", "ms": 1.0},
            {"operation": "loss", "impl": "triton", "ms": 2.0},
        ],
    }
    gains = {"sm_9x": {"attention bfloat16 bias mask": 1.5, "loss bfloat16": 0.5}}
    assert kernel_gains([results]) == gains
    committed = sorted((ROOT / "benchmarks/results").glob("ops_gpu*.json"))
    packaged = measured_gains()
    assert packaged == kernel_gains([json.loads(path.read_text()) for path in committed])


def test_a_way_that_fails_costs_its_own_row(monkeypatch):
    def missing():
        raise ImportError("No module named 'rival'\nat all")

    def wrong():
        return x * 3

    x = torch.ones(4, requires_grad=True)
    ways = {"plain": lambda: x * 2, "rival": missing, "wrong": wrong, "ours": lambda: x + x}
    monkeypatch.setattr(ops, "cases", lambda device: {"sum": lambda: ops.Case([x], ways)})
    rows, failed = ops.measure("sum", "cpu", 1, (1.0, 1.0))
    assert [row["impl"] for row in rows] == ["plain", "ours"]
    assert failed["sum: rival"] == "ImportError: No module named 'rival'"
    assert failed["sum: wrong"].startswith("AssertionError")


def test_evaluation_needs_equal_predictions():
    row = {"method": "direct", "task": "whole suite", "speedup": 4.0, "different_predictions": 0}
    assert judge(row, 4.0).endswith(": met")
    assert judge(row | {"different_predictions": 1}, 4.0).endswith(": NOT met")
    assert judge(row | {"speedup": 3.9}, 4.0).endswith(": NOT met")


def test_pretraining_fails_where_fused_and_plain_differ():
    curves = {"same_keys": True, "relative_difference": 1e-4, "allowed": 1e-4}
    assert failures_of(1e-5, curves) == []
    wrong = {"same_keys": False, "relative_difference": float("nan"), "allowed": 1e-4}
    assert len(failures_of(float("nan"), wrong)) == 3


def test_pretraining_is_compared_with_the_plain_way_of_the_same_padding():
    """32 samples of 512 tokens; with padding three quarters of them are tokens."""

    def runs(padding, seconds, gib):
        return {"padding": padding, "seconds": [seconds], "bytes": gib * 2**30}

    padded = "half to full"
    rows = rows_of(
        {
            "metro": [runs("none", 0.0625, 2), runs(padded, 0.0625, 2)],
            "plain": [runs("none", 0.25, 8), runs(padded, 0.5, 8)],
            "t5": [runs("none", 0.25, 4)],
        },
        batch_size=32,
        bounds={"metro": 5e5, "plain": 5e5},
    )
    first, second = rows[:2]
    assert (first["tokens/s"], second["tokens/s"]) == (262144, 196608)
    assert (first["x plain"], second["x plain"]) == (4, 8)
    assert (first["of plain"], rows[-1]["of plain"]) == (0.25, 0.5)
    assert first["of matrix peak"] == 0.524288 and second["of matrix peak"] is None
    assert rows[-1]["of matrix peak"] is None
    assert all(line.endswith(": met") for line in judge_pretraining(first))
    alone = rows_of({"metro": [runs("none", 0.1, 2)]}, 32, {"metro": 5e5})[0]
    assert [line.split(": ")[-1] for line in judge_pretraining(alone)] == ["NOT met"] * 4


def test_the_bound_of_span_corruption_is_what_its_products_take():
    """Oracle: PyTorch's count of the plain way, which computes both halves of causal attention."""
    config = MetroT5Config(vocab_size=VOCAB_SIZE, **SIZES["small"])
    _, loss_of = build_step("t5 plain", "small", dropout=0.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(t5_batch(1, "t5 plain"))
    masked_half = 2 * SPANS_LENGTH**2 * config.d_model * config.num_decoder_layers
    expected = span_flops_per_token(config) / 3 * LENGTH + masked_half
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
