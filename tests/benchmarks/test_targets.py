"""What the benchmarks say about their targets.

Oracle: by hand.
"""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ops, pretraining_curves
from benchmarks.common import Measured
from benchmarks.evaluation import as_row, judge, targets_of
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
    assert judge_projection(projection_rows(5))[0].endswith(": met without ['cut_cross_entropy']")
    assert "NOT met" in judge_projection(projection_rows(6))[0]
    others = [row | {"operation": "linear_cross_entropy, bias"} for row in projection_rows(5)]
    without_rivals = [row for row in others if row["impl"] in ("plain", "triton")]
    first, second = judge_projection(projection_rows(5) + without_rivals)
    assert ": met" in first and second.endswith("NOT met, not measured")


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
    """Whether it is missing, computes something else, or fails once it is timed."""
    calls = []

    def missing():
        raise ImportError("No module named 'rival'\nat all")

    def fails_late():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("launch failed")
        return x * 2

    x = torch.ones(4, requires_grad=True)
    ways = {
        "plain": lambda: x * 2,
        "broken": missing,
        "wrong": lambda: x * 3,
        "late": fails_late,
        "ours": lambda: x + x,
    }
    rivals = {"rival": missing, "good rival": lambda: lambda: x * 2}
    case = ops.Case([x], ways, rivals=rivals)
    monkeypatch.setattr(ops, "cases", lambda device: {"sum": lambda: case})
    rows, names, failed = ops.measure("sum", "cpu", 3, (1.0, 1.0))
    assert [row["impl"] for row in rows] == ["plain", "ours"] and names == [*rivals]
    assert failed["sum: broken"] == "ImportError: No module named 'rival'"
    assert failed["sum: wrong"].startswith("AssertionError")
    assert failed["sum: late"] == "RuntimeError: launch failed"
    rows, _, failed = ops.measure("sum", "cpu", 1, (1.0, 1.0), "rival")
    assert rows == [] and failed["sum: rival"] == "ImportError: No module named 'rival'"
    rows, _, failed = ops.measure("sum", "cpu", 1, (1.0, 1.0), "good rival")
    assert [row["impl"] for row in rows] == ["good rival"] and failed == {}


def test_what_counts_most_is_measured_first_and_rivals_after_it(monkeypatch):
    """Oracle: by hand. A rival whose process dies costs its row."""
    attention = "relative_position_attention, "
    rivals = {
        attention + "bias dropout mask": ["torch.compile"],
        "linear_cross_entropy, bias": ["torch.compile", "liger"],
        attention + "bias mask": ["torch.compile", "FlexAttention"],
    }
    asked = []

    def isolated(measure, name, device, repeats, rates, rival):
        asked.append((name, rival))
        if rival == "liger":
            raise RuntimeError("died with code -11")
        row = {"operation": name, "impl": rival or "plain", "x first": None if rival else 1.0}
        row["ms"] = 3.0 if rival else 6.0
        return Measured(([row], rivals.get(name, []), {}), 0.0, 0)

    monkeypatch.setattr(ops, "measure_isolated", isolated)
    names = list(ops.cases("cuda"))
    assert names[:3] == [*rivals] and len({*names}) == len(names) == 20
    known = list(ops.measure_all(names[:4], "cuda", 1, (1.0, 1.0)))
    first, second, third = rivals
    assert asked == [
        *((name, "") for name in rivals),
        (second, "liger"),
        (third, "FlexAttention"),
        *((name, "torch.compile") for name in rivals),
        (names[3], ""),
    ]
    assert [len(rows) for rows, _ in known] == [1, 2, 3, 3, 4, 5, 6, 7, 8]
    rows, failed = known[-1]
    assert failed == {"linear_cross_entropy, bias: liger": "died with code -11"}
    assert [row["operation"] for row in rows] == sorted(
        (row["operation"] for row in rows), key=names.index
    )
    assert {row["x first"] for row in rows if row["impl"] != "plain"} == {2.0}


def test_evaluation_needs_equal_predictions_but_on_a_gpu():
    """There both ways compute in bf16, and what differs is counted."""
    row = {"method": "direct", "task": "whole suite", "speedup": 4.0, "different_predictions": 0}
    row |= {"measured": 1016}
    assert judge(row, 4.0).endswith(": met")
    other = row | {"different_predictions": 9}
    assert judge(other, 4.0).endswith("target 4 x with equal predictions: NOT met")
    assert judge(other, 4.0, equal=False).endswith(
        "9 of 1,016 measured predictions differ; target 4 x: met"
    )
    assert judge(row | {"speedup": 3.9}, 4.0, equal=False).endswith(": NOT met")


def test_evaluation_is_judged_by_what_is_measured_so_far():
    """Oracle: by hand; sets count by their sizes: 10 x 4 s beside 10 x 1 s, 2 s beside 2 s."""
    seconds = {"published": 4.0, "ours": 1.0}
    rows = [as_row("direct", "a", 10, 0, 0.0, seconds, (0.5, 0.5))]
    (line,) = targets_of(rows, {"a": 100, "b": 10}, on_gpu=True)
    assert line.startswith("direct, whole suite, 1 of 2 sets: 4 x") and line.endswith(": met")
    rows.append(as_row("direct", "b", 10, 1, 0.0, {"published": 2, "ours": 2}, (0.5, 0.5)))
    (line,) = targets_of(rows, {"a": 100, "b": 10}, on_gpu=True)
    assert line.startswith("direct, whole suite: 3.5 x the published way, 1 of 20 measured")
    assert line.endswith("target 4 x: NOT met")


def test_pretraining_fails_where_fused_and_plain_differ():
    curves = {"same_keys": True, "relative_difference": 1e-4, "allowed": 1e-4}
    assert failures_of(curves | {"loss_differences": {"METRO-base": 1e-5}}) == []
    nan = float("nan")
    wrong = {"same_keys": False, "relative_difference": nan, "allowed": 1e-4}
    differences = {"METRO-base": 1e-6, "T5-base spans": pretraining_curves.apart([2, nan], [2, 2])}
    found = failures_of(wrong | {"loss_differences": differences})
    assert len(found) == 3 and found[0].startswith("T5-base spans: losses of METRO and the plain")
    assert failures_of({"losses": {}}) == []  # nothing was looked at yet


def test_curves_of_a_gpu_are_known_run_by_run(monkeypatch):
    """Oracle: by hand; plain differs from float32 by 1 %, so that fused may by 2 %."""
    losses = {(True, "bfloat16"): 2.02, (False, "bfloat16"): 2.0, (False, "float32"): 2.02}

    def isolated(run, fused, size, batch_size, device, dtype):
        found = {"losses": [losses[fused, dtype]], "keys": ["a"], "faults": ["b"] * fused}
        return Measured(found, 0.0, 0)

    monkeypatch.setattr(pretraining_curves, "measure_isolated", isolated)
    known = [dict(facts) for facts in pretraining_curves.compare_curves("base", 8, "cuda")]
    assert known[0] == {"losses": {"fused": [2.02]}, "faults": ["b"]}
    assert known[1]["relative_difference"] == pytest.approx(0.01) and known[1]["same_keys"]
    assert known[2]["allowed"] == pytest.approx(2 * (1 - 2 / 2.02))
    assert [failures_of(facts) for facts in known] == [[], [], []]


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
    assert all(line.endswith(": met") for line in judge_pretraining(rows[::-1]))
    alone = rows_of({"metro": [runs("none", 0.1, 2)]}, 32, {"metro": 5e5})
    assert [line.split(": ")[-1] for line in judge_pretraining(alone)] == ["NOT met"] * 4
    plain = [row for row in rows if row["way"] == "plain"]
    for failed, reason in (({}, "not measured"), ({"metro": "died"}, "failed")):
        lines = judge_pretraining(plain, failed)
        assert len(lines) == 4
        assert all(f": {reason}, target" in x and x.endswith("NOT met") for x in lines)


def test_the_bound_of_span_corruption_is_what_its_products_take():
    """Oracle: PyTorch's count of the plain way, which computes both halves of causal attention."""
    config = MetroT5Config(vocab_size=VOCAB_SIZE, **SIZES["small"])
    _, loss_of = build_step("t5 plain", "small", dropout=0.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(t5_batch(1, "t5 plain"))
    masked_half = 2 * SPANS_LENGTH**2 * config.d_model * config.num_decoder_layers
    expected = span_flops_per_token(config) / 3 * LENGTH + masked_half
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
