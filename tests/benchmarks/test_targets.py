"""What the benchmarks say about their targets.

Oracle: by hand.
"""

from benchmarks.evaluation import judge
from benchmarks.ops import judge_projection
from benchmarks.pretraining import failures_of


def projection_rows(peak_mib: float) -> list[dict]:
    times = {"plain": (1, 1), "triton": (2, peak_mib), "torch.compile": (3, 5), "liger": (2, 9)}
    return [
        {"operation": "linear_cross_entropy", "impl": impl, "ms": ms, "peak MiB": peak}
        for impl, (ms, peak) in times.items()
    ]


def test_the_projection_is_judged_by_time_and_memory_of_its_rivals():
    assert judge_projection(projection_rows(5)).endswith(": met without ['cut_cross_entropy']")
    assert "NOT met" in judge_projection(projection_rows(6))


def test_evaluation_needs_equal_predictions():
    row = {"method": "direct", "task": "whole suite", "speedup": 4.0, "different_predictions": 0}
    assert judge(row).endswith(": met")
    assert judge(row | {"different_predictions": 1}).endswith(": NOT met")
    assert judge(row | {"speedup": 3.9}).endswith(": NOT met")


def test_pretraining_fails_where_fused_and_plain_differ():
    curves = {"same_keys": True, "relative_difference": 1e-4, "allowed": 1e-4}
    assert failures_of(1e-5, curves) == []
    wrong = {"same_keys": False, "relative_difference": float("nan"), "allowed": 1e-4}
    assert len(failures_of(float("nan"), wrong)) == 3
