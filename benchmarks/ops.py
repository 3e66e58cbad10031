"""Speed and memory of each operation of `metro.ops` beside its alternatives, forward and backward.

On the CPU in float32; on a GPU in bf16, also beside torch.compile, liger-kernel and
cut-cross-entropy where they are installed. All of an operation are checked to compute the same
before they are timed, in turn, in a process for each operation. A failure costs the rows of its
operation only: results are written after each. "timed" says whether both passes were replayed as a
CUDA graph, which is done where all of an operation's ways are known to allow it, or launched.

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
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.common import measure_isolated, print_table, write_results
from benchmarks.timing import kept_bytes, measure_rates, outputs_of, peak_bytes, timer_of
from metro.ops.adamw import adamw_step
from metro.ops.dropout import dropout
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm
from metro.ops.feed_forward import feed_forward
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


def attention_case(
    device: str, p: float = 0.1, has_bias=False, is_causal=False, is_padded=False, some=False
) -> Case:
    """Of one layer; on a GPU of a batch of 32, and, without dropout, FlexAttention beside it.

    ``some``: for queries at 15 % of the positions, as in the last layer of METRO's auxiliary model
    and of its decoder. FlexAttention is not measured there.
    """
    batch = ROWS[device] // LENGTH
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(batch, LENGTH, HEADS, WIDTH, device=device).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    bias = torch.randn(HEADS, 2 * LENGTH - 1, device=device) if has_bias else None
    key_mask = None
    if is_padded:  # to half the length at most
        lengths = torch.linspace(LENGTH // 2, LENGTH, batch, device=device)
        key_mask = torch.arange(LENGTH, device=device) < lengths.unsqueeze(1)
    positions = None
    if some:
        chosen = torch.rand(batch, LENGTH, device=device).topk(round(0.15 * LENGTH)).indices
        positions = chosen.sort(1).values
        q = q[:, :, : positions.shape[1]].contiguous()
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]

    def run(impl):
        return relative_position_attention(q, k, v, bias, key_mask, is_causal, positions, p, impl)

    kernel = "triton" if device == "cuda" else "cached"
    ways = {impl: partial(run, impl) for impl in ("reference", kernel)}
    ways = with_compiled(ways, device, ways["reference"])
    if device == "cuda" and not p and not some:
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
    ways = {impl: partial(dropout, x, 0.1, impl=impl) for impl in ("reference", "bytes")}
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


def dropout_add_layer_norm_case(device: str, p: float) -> Case:
    num_rows = ROWS[device]
    leaves = draw_leaves(device, (num_rows, D), (num_rows, D), (D,), (D,))

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


def projection_case(device: str, samples: bool) -> Case:
    """Tied projection of 1,024 tokens, on a GPU 8,192; multinomial waits for it."""
    num_rows, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    hidden, weight = (torch.randn(n, D, device=device) for n in (num_rows, VOCAB_SIZE))
    leaves = [x.div_(D**0.25).to(dtype).requires_grad_() for x in (hidden, weight)]
    targets = torch.randint(VOCAB_SIZE, (num_rows,), device=device)
    counters = torch.arange(num_rows, device=device)

    def plain():
        logits = F.linear(*leaves).float()
        logits.argmax(-1)
        if samples:
            torch.multinomial(logits.detach().softmax(-1), 1)
        return F.cross_entropy(logits, targets, reduction="none")

    def ours(impl):
        if samples:
            return linear_sample_cross_entropy(*leaves, targets, counters, counters, impl=impl).loss
        return linear_cross_entropy(*leaves, targets, impl=impl).loss

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
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        ways["liger"] = partial(
            liger_fused_linear_cross_entropy, *leaves, targets, reduction="none"
        )
    except ImportError as error:
        print(f"liger is left out: {error}")
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        ways["cut_cross_entropy"] = partial(cut, *leaves, targets, reduction="none")
    except ImportError as error:
        print(f"cut_cross_entropy is left out: {error}")
    return ways


CASES = {
    "cpu": {
        "relative_position_attention, bias": partial(attention_case, has_bias=True),
        "relative_position_attention, causal": partial(attention_case, is_causal=True),
        "relative_position_attention, cross": attention_case,
        "relative_position_attention, bias, at positions, no dropout": partial(
            attention_case, p=0.0, has_bias=True, some=True
        ),
        "relative_position_attention, causal, at positions": partial(
            attention_case, is_causal=True, some=True
        ),
        "dropout": dropout_case,
        "dropout_add_layer_norm": partial(dropout_add_layer_norm_case, p=0.1),
        "feed_forward": feed_forward_case,
        "packed_linear": packed_linear_case,
        "linear_cross_entropy": partial(projection_case, samples=False),
        "linear_sample_cross_entropy": partial(projection_case, samples=True),
        "adamw": adamw_case,
    },
    "cuda": {
        "relative_position_attention, bias": partial(attention_case, has_bias=True),
        "relative_position_attention, bias, no dropout": partial(
            attention_case, has_bias=True, p=0.0
        ),
        "relative_position_attention, bias, padded, no dropout": partial(
            attention_case, p=0.0, has_bias=True, is_padded=True
        ),
        "relative_position_attention, causal": partial(attention_case, is_causal=True),
        "relative_position_attention, causal, no dropout": partial(
            attention_case, is_causal=True, p=0.0
        ),
        "relative_position_attention, cross, padded, no dropout": partial(
            attention_case, is_padded=True, p=0.0
        ),
        "relative_position_attention, bias, at positions, no dropout": partial(
            attention_case, p=0.0, has_bias=True, some=True
        ),
        "relative_position_attention, causal, at positions": partial(
            attention_case, is_causal=True, some=True
        ),
        "dropout_add_layer_norm": partial(dropout_add_layer_norm_case, p=0.1),
        "dropout_add_layer_norm, no dropout": partial(dropout_add_layer_norm_case, p=0.0),
        "feed_forward": feed_forward_case,
        "packed_linear": packed_linear_case,
        "adamw": adamw_case,
        "linear_cross_entropy": partial(projection_case, samples=False),
        "linear_sample_cross_entropy": partial(projection_case, samples=True),
    },
}


def floor_seconds(case: Case, rates: tuple[float, float]) -> float:
    """The least time for what a case must compute and move, at multiplied and copied per second."""
    return max(case.flops / rates[0], case.moved / rates[1])


def measure(name: str, device: str, repeats: int, rates: tuple[float, float]) -> list[dict]:
    """A row for each way; in a process of its own, as compilers and memory remember."""
    torch.manual_seed(0)
    case = CASES[device][name](device)
    if not case.is_random:
        want, *others = (
            torch.cat([x.detach().float().flatten() for x in outputs_of(run)])
            for run in case.ways.values()
        )
        tolerance = 1e-4 if device == "cpu" else 2e-2
        for way, got in zip(list(case.ways)[1:], others, strict=True):
            torch.testing.assert_close(
                got, want, rtol=tolerance, atol=tolerance, msg=lambda m, way=way: f"{way}: {m}"
            )
    peaks = {
        way: peak_bytes(run, case.leaves) / 2**20 if device == "cuda" else None
        for way, run in case.ways.items()
    }
    replayed = device == "cuda" and case.can_replay
    timers = {way: timer_of(run, case.leaves, device, replayed) for way, run in case.ways.items()}
    times = {way: [] for way in case.ways}
    for _ in range(repeats + 1):
        for way, seconds in timers.items():
            times[way].append(seconds())
    medians = {way: statistics.median(values[1:]) for way, values in times.items()}
    first, floor = next(iter(medians.values())), floor_seconds(case, rates)
    replaces = REPLACES.get(name.split(",")[0], "")
    rows = []
    for way, run in case.ways.items():
        row = {"operation": name, "replaces": replaces, "impl": way, "ms": medians[way] * 1e3}
        row["x first"] = first / medians[way]
        row["floor ms"] = floor * 1e3 or None
        row["of floor"] = floor / medians[way] or None
        row["kept MiB"] = kept_bytes(run) / 2**20
        if device == "cuda":
            row |= {"peak MiB": peaks[way], "timed": "replayed" if replayed else "launched"}
        rows.append(row)
    return rows


def judge_projection(rows: list[dict]) -> str:
    """Say whether our loss of a projection reaches the best rival that was measured beside it."""
    found = {row["impl"]: row for row in rows if row["operation"] == "linear_cross_entropy"}
    rivals = [found[name] for name in PROJECTION_RIVALS if name in found]
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
    parser.add_argument("--device", choices=list(CASES), default=default)
    parser.add_argument("--only", default="", help="operations whose name starts so")
    parser.add_argument("--repeats", type=int, default=9, help="runs of every way, in turn")
    args = parser.parse_args()
    names = [name for name in CASES[args.device] if name.startswith(args.only)]
    if not names:
        known = list(CASES[args.device])
        raise SystemExit(f"no operation starts with {args.only!r}; use one of {known}")
    rates = measure_isolated(measure_rates, args.device).value
    facts = dict(zip(("matrix_flops", "copied_bytes_per_second"), rates, strict=True))
    rows, failed = [], {}
    for name in names:
        try:
            rows += measure_isolated(measure, name, args.device, args.repeats, rates).value
        except RuntimeError as error:  # the reason has been printed by the process
            failed[name] = str(error)
        if rows and not args.only:
            subject = "ops" if args.device == "cpu" else "ops_gpu"
            write_results(subject, rows, **facts, failed=failed)
    if rows:
        print_table(rows, f"B {BATCH}, H {HEADS}, T {LENGTH}, K {WIDTH}, V {VOCAB_SIZE}, median")
    if args.device == "cuda" and any(row["operation"] == "linear_cross_entropy" for row in rows):
        print(judge_projection(rows))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
