"""Speed and memory of each operation of `metro.ops` beside its alternatives, forward and backward.

On the CPU in float32; on a GPU in bf16, also beside torch.compile, liger-kernel and
cut-cross-entropy where they are installed. All of an operation are checked to compute the same
before they are timed, in turn, in a process for each operation. A way that fails costs its own row
only, and results are written after each operation. "timed" says whether both passes were replayed
as a CUDA graph, which is done where all of an operation's ways are known to allow it, or launched.

"floor ms" is the least time that multiplications and additions, or the bytes of inputs, outputs and
gradients, can take at the rates of a matrix product and of a copy that are measured in the same
run; "of floor" is what share of the time that is.

Floors: `relative_position_attention` multiplies 14 B H T S K (forward 4, backward 10 with the
scores computed again, half where causal), a tenth of what a layer's matrices cost at 512 tokens,
and moves 12 times B H T K; `feed_forward` multiplies 12 N D F, `packed_linear` 6 N D O,
`linear_cross_entropy` and `linear_sample_cross_entropy` 6 N V D, and 2 N V D more where logits are
computed again; `dropout` moves 4 numbers for each element, `dropout_add_layer_norm` 8, `adamw` 7
for each parameter. "kept" is what autograd holds between the passes.

"replaces" names the operation of the original's fused extension in whose place ours stands.

``--write-gains`` measures nothing: it writes from the GPU results in ``benchmarks/results`` how
many times as fast as PyTorch's operations each kernel was, by generation of GPUs, into
``metro/ops/kernels/measured.json``, by which ``impl="auto"`` chooses.

Why more than 400 lines: every operation's case stands beside the one loop that measures them all.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.common import ROOT, measure_isolated, print_table, write_results
from benchmarks.timing import kept_bytes, measure_rates, outputs_of, peak_bytes, timer_of
from metro.ops.adamw import adamw_step
from metro.ops.dispatch import case_name
from metro.ops.dropout import dropout
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm
from metro.ops.feed_forward import feed_forward
from metro.ops.kernels.trials import TRAINED
from metro.ops.linear_cross_entropy import linear_cross_entropy
from metro.ops.linear_sample_cross_entropy import linear_sample_cross_entropy
from metro.ops.packed_linear import packed_linear
from metro.ops.relative_position_attention import relative_position_attention

BATCH, HEADS, LENGTH, WIDTH = 4, 12, 512, 64
D, INNER, VOCAB_SIZE = HEADS * WIDTH, 3072, 32768
ROWS = {"cpu": BATCH * LENGTH, "cuda": 32 * LENGTH}
"""Tokens that the operations of whole layers get."""
REPLACES = {
    "relative_position_attention": "softmax_dropout",
    "dropout_add_layer_norm": "layer_norm",
    "linear_cross_entropy": "cross_entropy",
    "linear_sample_cross_entropy": "cross_entropy",
}
"""Operation -> the one of the original's fused extension that it replaces."""
PROJECTION_RIVALS = {"torch.compile", "liger", "cut_cross_entropy"}


class Case(NamedTuple):
    """One operation on given inputs."""

    leaves: list[torch.Tensor]
    ways: dict[str, Callable[[], torch.Tensor | list[torch.Tensor]]]
    """Name and function; the first one is what the others are compared with."""
    is_random: bool = False
    """Outputs differ, and are not compared."""
    flops: float = 0.0
    """Multiplications and additions that no way can do without, forward and backward."""
    moved: float = 0.0
    """Bytes likewise."""
    can_replay: bool = False
    """All ways are known not to wait for the GPU in between: a CUDA graph can hold them."""


def attention_case(device: str, *flags: str) -> Case:
    """Of one layer; on a GPU of a batch of 32, and, without dropout, FlexAttention beside it.

    ``flags``: bias, causal, mask, dropout, and positions: for queries at 15 % of the positions, as
    in the last layer of METRO's auxiliary model and of its decoder, where FlexAttention is not
    measured.
    """
    p, is_causal = 0.1 * ("dropout" in flags), "causal" in flags
    batch = ROWS[device] // LENGTH
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(batch, LENGTH, HEADS, WIDTH, device=device).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    bias = torch.randn(HEADS, 2 * LENGTH - 1, device=device) if "bias" in flags else None
    key_mask = None
    if "mask" in flags:  # to half the length at most
        lengths = torch.linspace(LENGTH // 2, LENGTH, batch, device=device)
        key_mask = torch.arange(LENGTH, device=device) < lengths.unsqueeze(1)
    positions = None
    if "positions" in flags:
        chosen = torch.rand(batch, LENGTH, device=device).topk(round(0.15 * LENGTH)).indices
        positions = chosen.sort(1).values
        q = q[:, :, : positions.shape[1]].contiguous()
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]

    def run(impl):
        return relative_position_attention(q, k, v, bias, key_mask, is_causal, positions, p, impl)

    kernel = "triton" if device == "cuda" else "cached"
    ways = {impl: partial(run, impl) for impl in ("reference", kernel)}
    ways = with_compiled(ways, device, ways["reference"])
    if device == "cuda" and not p and positions is None:
        ways["FlexAttention"] = flex_attention_way(q, k, v, bias, key_mask, is_causal)
    num_pairs = q.shape[:3].numel() * LENGTH / (2 if is_causal else 1)
    moved = 6 * (q.nbytes + k.nbytes)
    return Case(leaves, ways, bool(p), 14 * num_pairs * WIDTH, moved, can_replay=True)


def flex_attention_way(q, k, v, bias, key_mask, is_causal) -> Callable[[], torch.Tensor]:
    """Bias and visibility as functions of a pair; it has no dropout, and on the CPU no gradients.

    Its blocks of visible pairs are found once, which a training step has to do for every batch.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def add_bias(score, row, head, query, key):
        return score if bias is None else score + bias[head, key - query + LENGTH - 1]

    def is_visible(row, head, query, key):
        visible = key <= query if is_causal else key >= 0
        return visible if key_mask is None else visible & key_mask[row, key]

    blocks = None
    if is_causal or key_mask is not None:
        blocks = create_block_mask(is_visible, len(q), None, LENGTH, LENGTH, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, score_mod=add_bias, block_mask=blocks)


def dropout_case(device: str) -> Case:
    x = torch.randn(BATCH, LENGTH, D).requires_grad_()
    ways = {impl: partial(dropout, x, 0.1, impl=impl) for impl in ("reference", "bits")}
    return Case([x], ways, is_random=True, moved=4 * x.nbytes)


def draw_leaves(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Small numbers in the type of the device."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [
        (torch.randn(shape, device=device) * 0.05).to(dtype).requires_grad_() for shape in shapes
    ]


def with_compiled(ways: dict[str, Callable], device: str, plain: Callable) -> dict[str, Callable]:
    """On a GPU torch.compile of PyTorch's way as well."""
    return {**ways, "torch.compile": torch.compile(plain)} if device == "cuda" else ways


def feed_forward_case(device: str) -> Case:
    num_rows = ROWS[device]
    leaves = draw_leaves(device, (num_rows, D), (INNER, D), (INNER,), (D, INNER), (D,))
    impls = ("reference", "epilogue" if device == "cuda" else "in_place")
    ways = {impl: partial(feed_forward, *leaves, impl=impl) for impl in impls}
    ways = with_compiled(ways, device, ways["reference"])
    return Case(leaves, ways, flops=12 * num_rows * D * INNER, can_replay=True)


def packed_linear_case(device: str) -> Case:
    """Queries, keys and values."""
    num_rows = ROWS[device]
    leaves = draw_leaves(device, (num_rows, D), *[(D, D)] * 3, *[(D,)] * 3)
    x, weights, biases = leaves[0], leaves[1:4], leaves[4:]
    impls = ("reference", "summed", "packed")
    ways = {impl: partial(packed_linear, x, weights, biases, impl) for impl in impls}
    ways = with_compiled(ways, device, ways["reference"])
    return Case(leaves, ways, False, 6 * num_rows * D * 3 * D, 9 * x.nbytes, can_replay=True)


def dropout_add_layer_norm_case(device: str, *flags: str) -> Case:
    """``mixed``: with a residual and weights in float32, as under autocast."""
    num_rows, p = ROWS[device], 0.1 * ("dropout" in flags)
    leaves = draw_leaves(device, (num_rows, D), (num_rows, D), (D,), (D,))
    if "mixed" in flags:
        leaves = [leaves[0], *(x.detach().float().requires_grad_() for x in leaves[1:])]

    def plain():
        x, residual, weight, bias = leaves
        return F.layer_norm(residual + F.dropout(x, p), (D,), weight, bias)

    impl = "triton" if device == "cuda" else "reference"
    ways = {"plain": plain, impl: partial(dropout_add_layer_norm, *leaves, p, impl=impl)}
    ways, moved = with_compiled(ways, device, plain), (8 if p else 7) * leaves[0].nbytes
    return Case(leaves, ways, bool(p), moved=moved, can_replay=True)


def adamw_case(device: str) -> Case:
    """Matrices of twelve layers (on the CPU three) in float32, each way with its own."""
    layers = 12 if device == "cuda" else 3
    shapes = ([(D, D), (D,)] * 4 + [(INNER, D), (INNER,)] * 2) * layers
    settings = dict(lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)

    def way(impl):
        tensors = [[torch.randn(s, device=device) for s in shapes] for _ in range(4)]
        tensors[3] = [x.square() for x in tensors[3]]
        return partial(adamw_step, *tensors, 100, impl=impl, **settings)

    size = sum(math.prod(shape) for shape in shapes)
    ways = {impl: way(impl) for impl in ("reference", "fused")}
    return Case([], ways, True, moved=28 * size, can_replay=True)


def projection_case(device: str, *flags: str, samples: bool) -> Case:
    """Tied projection of 1,024 tokens, on a GPU 8,192; multinomial waits for it."""
    num_rows, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    hidden, weight = (torch.randn(n, D, device=device) for n in (num_rows, VOCAB_SIZE))
    leaves = [x.div_(D**0.25).to(dtype).requires_grad_() for x in (hidden, weight)]
    bias = torch.zeros(VOCAB_SIZE, device=device, dtype=dtype) if "bias" in flags else None
    targets = torch.randint(VOCAB_SIZE, (num_rows,), device=device)
    counters = torch.arange(num_rows, device=device)

    def plain():
        logits = F.linear(*leaves, bias).float()
        logits.argmax(-1)
        if samples:
            torch.multinomial(logits.detach().softmax(-1), 1)
        return F.cross_entropy(logits, targets, reduction="none")

    def ours(impl):
        if samples:
            given = (*leaves, targets, counters, counters)
            return linear_sample_cross_entropy(*given, bias_V=bias, impl=impl).loss
        return linear_cross_entropy(*leaves, targets, bias_V=bias, impl=impl).loss

    ways = {"plain": plain, "reference": partial(ours, "reference")}
    if device == "cuda":
        ways["triton"] = partial(ours, "triton")
        ways["torch.compile"] = torch.compile(plain)
    if device == "cuda" and not samples:
        ways |= other_projections(leaves, targets)
    return Case(leaves, ways, flops=6 * num_rows * VOCAB_SIZE * D)


def other_projections(leaves, targets) -> dict[str, Callable[[], torch.Tensor]]:
    """Those of other packages, as far as they are installed."""
    ways = {}
    with suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        ways["liger"] = partial(liger, *leaves, targets, reduction="none")
    with suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cut

        ways["cut_cross_entropy"] = partial(cut, *leaves, targets, reduction="none")
    return ways


OPERATIONS: dict[str, Callable[..., Case]] = {
    "relative_position_attention": attention_case,
    "linear_cross_entropy": partial(projection_case, samples=False),
    "linear_sample_cross_entropy": partial(projection_case, samples=True),
    "dropout_add_layer_norm": dropout_add_layer_norm_case,
    "feed_forward": feed_forward_case,
    "packed_linear": packed_linear_case,
    "dropout": dropout_case,
    "adamw": adamw_case,
}
ON_CPU = {
    "relative_position_attention": ["bias dropout", "causal dropout", "dropout", "bias positions"],
    "dropout_add_layer_norm": ["dropout"],
}


def cases(device: str) -> dict[str, Callable[[str], Case]]:
    """Name (operation, comma, optional inputs) and case; on a GPU all that kernels are used for."""
    flags = ON_CPU
    if device == "cuda":
        flags = {op: [" ".join(given) for given in sets] for op, sets in TRAINED.items()}
    return {
        f"{op}, {given}" if given else op: partial(build, device, *given.split())
        for op, build in OPERATIONS.items()
        for given in flags.get(op, [""])
        if op != "dropout" or device == "cpu"
    }


def floor_seconds(case: Case, rates: tuple[float, float]) -> float:
    """The least time for what a case must compute and move, at multiplied and copied per second."""
    return max(case.flops / rates[0], case.moved / rates[1])


def measure(name: str, device: str, repeats: int, rates: tuple[float, float]):
    """A row for each way; in a process of its own, as compilers and memory remember.

    Returns:
        the rows, and what other ways than the first have raised.
    """
    torch.manual_seed(0)
    case, failed, peaks, timers = cases(device)[name](), {}, {}, {}
    replayed, want = device == "cuda" and case.can_replay, None
    tolerance = 1e-4 if device == "cpu" else 2e-2
    for way, run in case.ways.items():
        try:
            got = [x.detach().float() for x in outputs_of(run)]
            if want is not None and not case.is_random:
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            want = got if want is None else want
            peaks[way] = peak_bytes(run, case.leaves) / 2**20 if device == "cuda" else None
            timers[way] = timer_of(run, case.leaves, device, replayed)
        except Exception as error:  # compilers and other packages raise what they like
            if not timers:
                raise
            failed[f"{name}: {way}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    times = {way: [] for way in timers}
    for _ in range(repeats + 1):
        for way, seconds in timers.items():
            times[way].append(seconds())
    medians = {way: statistics.median(values[1:]) for way, values in times.items()}
    first, floor = next(iter(medians.values())), floor_seconds(case, rates)
    replaces = REPLACES.get(name.split(",")[0], "")
    rows = []
    for way in timers:
        row = {"operation": name, "replaces": replaces, "impl": way, "ms": medians[way] * 1e3}
        row["x first"] = first / medians[way]
        row["floor ms"] = floor * 1e3 or None
        row["of floor"] = floor / medians[way] or None
        row["kept MiB"] = kept_bytes(case.ways[way]) / 2**20
        if device == "cuda":
            row |= {"peak MiB": peaks[way], "timed": "replayed" if replayed else "launched"}
        rows.append(row)
    return rows, failed


def kernel_gains(results: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Generation of GPUs -> case -> times PyTorch's speed, from results of this benchmark."""
    gains: dict[str, dict[str, float]] = {}
    for result in results:
        major = result["environment"]["gpus"][0]["capability"].split(".")[0]
        of_generation = gains.setdefault(f"sm_{major}x", {})
        for row in result["rows"]:
            if row["impl"] == "triton":
                beside = [r for r in result["rows"] if r["operation"] == row["operation"]]
                plain = min(r["ms"] for r in beside if r["impl"] in ("plain", "reference"))
                op, _, flags = row["operation"].partition(", ")
                name = case_name(op, torch.bfloat16, tuple(flags.split()))
                of_generation[name] = round(plain / row["ms"], 2)
    return gains


def write_gains() -> None:
    paths = sorted((ROOT / "benchmarks/results").glob("ops_gpu*.json"))
    gains = kernel_gains([json.loads(path.read_text()) for path in paths])
    (ROOT / "metro/ops/kernels/measured.json").write_text(json.dumps(gains, indent=2) + "\n")


def judge_projection(rows: list[dict]) -> str:
    """Say whether our loss of a projection reaches the best rival that was measured beside it."""
    found = {
        row["impl"]: row for row in rows if row["operation"].startswith("linear_cross_entropy")
    }
    rivals = [found[name] for name in PROJECTION_RIVALS if name in found]
    if not rivals or "triton" not in found:
        return "linear_cross_entropy: target: the least of others: NOT met, not measured"
    best = {key: min(row[key] for row in rivals) for key in ("ms", "peak MiB")}
    met = all(found["triton"][key] <= best[key] for key in best)
    ours = {key: found["triton"][key] for key in best}
    missing = sorted(PROJECTION_RIVALS - found.keys())
    return (
        f"linear_cross_entropy: {ours['ms']:.3g} ms and {ours['peak MiB']:.0f} MiB, target: the "
        f"least of others, {best['ms']:.3g} ms and {best['peak MiB']:.0f} MiB: "
        f"{'met' if met else 'NOT met'}{f' without {missing}' if missing else ''}"
    )


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
    facts = dict(zip(("matrix_flops", "copied_bytes_per_second"), rates, strict=True))
    rows, failed = [], {}
    for name in names:
        try:
            measured = measure_isolated(measure, name, args.device, args.repeats, rates).value
            rows, failed = rows + measured[0], failed | measured[1]
        except RuntimeError as error:  # the reason has been printed by the process
            failed[name] = str(error)
        if rows and (args.only == [""] or "OUT" in os.environ):
            subject = "ops" if args.device == "cpu" else "ops_gpu"
            write_results(subject, rows, **facts, failed=failed)
    if rows:
        print_table(rows, f"B {BATCH}, H {HEADS}, T {LENGTH}, K {WIDTH}, V {VOCAB_SIZE}, median")
    if args.device == "cuda" and any(name.startswith("linear_cross") for name in names):
        print(judge_projection(rows))
    if failed:
        raise SystemExit("\n".join(f"failed: {name}: {error}" for name, error in failed.items()))


if __name__ == "__main__":
    main()
