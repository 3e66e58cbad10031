"""Speed and memory of each operation of `metro.ops` beside its alternatives, forward and backward.

On the CPU in float32; on a GPU in bf16, also beside torch.compile, FlexAttention, liger-kernel and
cut-cross-entropy where they are installed. Outputs of all ways of an operation are compared before
they are timed; METRO's and the plain way take turns in a process for each operation, and each rival
has one of its own. A way that fails costs its own row only, and results are written after each
process: first of all METRO's of what counts most, then their rivals, then the rest. "timed" says
whether both passes were replayed as a CUDA graph, which is done where all of an operation's ways
are known to allow it, or launched.

"floor ms" is the least time that multiplications and additions, or the bytes of inputs, outputs and
gradients, can take at the rates of a matrix product and of ``x += y`` that are measured in the same
run; "of floor" is what share of the time that is.

Floors are explained in `ops_cases.py`. "kept" is what autograd holds between the passes.

"replaces" names the operation of the original's fused extension in whose place ours stands.

``--write-gains`` measures nothing: it writes from the GPU results in ``benchmarks/results`` how
many times as fast as PyTorch's operations each kernel was, by generation of GPUs, into
``metro/ops/kernels/measured.json``, by which ``impl="auto"`` chooses.
"""

import argparse
import json
import os
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common import ROOT, measure_isolated, print_table, write_results
from benchmarks.ops_cases import (
    BATCH,
    HEADS,
    LENGTH,
    MOST_VALUED,
    VOCAB_SIZE,
    WIDTH,
    Case,
    Way,
    cases,
)
from benchmarks.timing import kept_bytes, measure_rates, outputs_of, peak_bytes, timer_of
from metro.ops.dispatch import case_name

REPLACES = {
    "relative_position_attention": "softmax_dropout",
    "dropout_add_layer_norm": "layer_norm",
    "linear_cross_entropy": "cross_entropy",
    "linear_sample_cross_entropy": "cross_entropy",
}
"""Operation -> the one of the original's fused extension that it replaces."""
PROJECTION_RIVALS = {"torch.compile", "liger", "cut_cross_entropy"}


def floor_seconds(case: Case, rates: tuple[float, float]) -> float:
    """The least time for what a case must compute and move, at multiplied and copied per second."""
    return max(case.flops / rates[0], case.moved / rates[1])


def measure(
    name: str, device: str, repeats: int, rates: tuple[float, float], rival: str = ""
) -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
    """A row for METRO's ways and the plain one, in turn, or for a rival alone.

    In a process of its own, as compilers and memory remember.

    Returns:
        the rows, the names of rivals, and what ways have raised.
    """
    torch.manual_seed(0)
    case, failed = cases(device)[name](), {}
    first_way, plain = next(iter(case.ways.items()))
    want = [x.detach().float() for x in outputs_of(plain)]
    replayed = device == "cuda" and case.can_replay
    timers, rows, seconds = {}, {}, {}
    for way in [rival] if rival else case.ways:
        with noting(failed, f"{name}: {way}"):
            run = case.rivals[rival]() if rival else case.ways[way]
            compare(run, case, want, device)
            rows[way] = {"kept MiB": kept_bytes(run) / 2**20}
            if device == "cuda":
                peak = peak_bytes(run, case.leaves) / 2**20
                rows[way] |= {"peak MiB": peak, "timed": "replayed" if replayed else "launched"}
            timers[way], seconds[way] = timer_of(run, case.leaves, device, replayed), []
    for _ in range(repeats + 1):
        for way in list(timers):
            timer = timers.pop(way)
            with noting(failed, f"{name}: {way}"):
                seconds[way].append(timer())
                timers[way] = timer
    medians = {way: statistics.median(seconds[way][1:]) for way in timers}
    first, floor = medians.get(first_way), floor_seconds(case, rates)
    replaces = REPLACES.get(name.split(",")[0], "")
    found = []
    for way, median in medians.items():
        row = {"operation": name, "replaces": replaces, "impl": way, "ms": median * 1e3}
        row |= {"x first": first / median if first else None}
        row |= {"floor ms": floor * 1e3 or None, "of floor": floor / median or None}
        found.append(row | rows[way])
    return found, list(case.rivals), failed


@contextmanager
def noting(failed: dict[str, str], name: str) -> Iterator[None]:
    """Go on after an exception, of which the first line is noted."""
    try:
        yield
    except Exception as error:  # compilers and other packages raise what they like
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def compare(run: Way, case: Case, want: list[torch.Tensor], device: str) -> None:
    """Compare outputs with those of the first way, where they are not random.

    Raises:
        AssertionError: they differ.
    """
    tolerance = 1e-4 if device == "cpu" else 2e-2
    got = [x.detach().float() for x in outputs_of(run)]
    if not case.is_random:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def measure_all(
    names: Sequence[str], device: str, repeats: int, rates: tuple[float, float]
) -> Iterator[tuple[list[dict[str, Any]], dict[str, str]]]:
    """Rows and failures after each process, METRO's before those of rivals.

    What counts most is a group: its rivals come when all of it is measured, last of them
    torch.compile, which takes longest.
    """
    valued = [name for name in MOST_VALUED if name in names]
    groups = [valued, *([name] for name in names if name not in valued)]
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for group in groups:
        left = deque((name, "") for name in group)
        while left:
            name, rival = left.popleft()
            try:
                given = (name, device, repeats, rates, rival)
                found, rivals, its_failed = measure_isolated(measure, *given).value
            except RuntimeError as error:  # the reason has been printed by the process
                its_failed = {name + f": {rival}" * bool(rival): str(error)}
                found, rivals = [], []
            rows, failed = rows + found, failed | its_failed
            left += [] if rival else [(name, each) for each in rivals]
            if all(rival for _, rival in left):
                left = deque(sorted(left, key=lambda job: job[1] == "torch.compile"))
            yield with_first(rows, names), failed


def with_first(rows: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows by operation, those of rivals compared with the first way of the same operation."""
    first = {row["operation"]: row["ms"] for row in reversed(rows) if row["x first"] == 1.0}
    for row in rows:
        if row["x first"] is None and row["operation"] in first:
            row["x first"] = first[row["operation"]] / row["ms"]
    return sorted(rows, key=lambda row: names.index(row["operation"]))


def kernel_gains(results: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Generation of GPUs -> case -> times PyTorch's speed, from results of this benchmark."""
    gains: dict[str, dict[str, float]] = {}
    for result in results:
        major = result["environment"]["gpus"][0]["capability"].split(".")[0]
        of_generation = gains.setdefault(f"sm_{major}x", {})
        for row in result["rows"]:
            if row["impl"] == "triton":
                beside = [r for r in result["rows"] if r["operation"] == row["operation"]]
                plains = [r["ms"] for r in beside if r["impl"] in ("plain", "reference")]
                if not plains:  # they failed
                    continue
                op, _, flags = row["operation"].partition(", ")
                name = case_name(op, torch.bfloat16, tuple(flags.split()))
                of_generation[name] = round(min(plains) / row["ms"], 2)
    return gains


def write_gains() -> None:
    paths = sorted((ROOT / "benchmarks/results").glob("ops_gpu*.json"))
    gains = kernel_gains([json.loads(path.read_text()) for path in paths])
    (ROOT / "metro/ops/kernels/measured.json").write_text(json.dumps(gains, indent=2) + "\n")


def judge_projection(rows: list[dict]) -> list[str]:
    """Say of each projection whether our loss reaches the best rival measured beside it."""
    op, lines = "linear_cross_entropy", []
    for name in dict.fromkeys(row["operation"] for row in rows if row["operation"].startswith(op)):
        found = {row["impl"]: row for row in rows if row["operation"] == name}
        rivals = [found[each] for each in PROJECTION_RIVALS if each in found]
        if not rivals or "triton" not in found:
            lines.append(f"{name}: target: the least of others: NOT met, not measured")
            continue
        best = {key: min(row[key] for row in rivals) for key in ("ms", "peak MiB")}
        ours = {key: found["triton"][key] for key in best}
        met = all(ours[key] <= best[key] for key in best)
        missing = sorted(PROJECTION_RIVALS - found.keys())
        lines.append(
            f"{name}: {ours['ms']:.3g} ms and {ours['peak MiB']:.0f} MiB, target: the "
            f"least of others, {best['ms']:.3g} ms and {best['peak MiB']:.0f} MiB: "
            f"{'met' if met else 'NOT met'}{f' without {missing}' if missing else ''}"
        )
    return lines


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--only", nargs="+", default=[""], help="operations whose name starts so")
    parser.add_argument("--repeats", type=int, default=9, help="runs of every way, in turn")
    parser.add_argument("--write-gains", action="store_true", help="write the table of kernels")
    args = parser.parse_args()
    if args.write_gains:
        return write_gains()
    names = [name for name in cases(args.device) if name.startswith(tuple(args.only))]
    if not names:
        known = list(cases(args.device))
        raise SystemExit(f"no operation starts with {args.only}; use one of {known}")
    rates = measure_isolated(measure_rates, args.device).value
    facts = dict(zip(("matrix_flops", "bytes_per_second"), rates, strict=True))
    rows, failed, on_gpu = [], {}, args.device == "cuda"
    facts |= {"threads": torch.get_num_threads()}
    for rows, failed in measure_all(names, args.device, args.repeats, rates):
        if args.only == [""] or "OUT" in os.environ:
            facts["targets"] = judge_projection(rows) if on_gpu else []
            write_results("ops_gpu" if on_gpu else "ops", rows, **facts, failed=failed)
    if rows:
        print_table(rows, f"B {BATCH}, H {HEADS}, T {LENGTH}, K {WIDTH}, V {VOCAB_SIZE}, median")
    if on_gpu:
        print(*judge_projection(rows), sep="\n")
    if failed:
        raise SystemExit("\n".join(f"failed: {name}: {error}" for name, error in failed.items()))


if __name__ == "__main__":
    main()
