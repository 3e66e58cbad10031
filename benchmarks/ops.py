"""Speed and memory of each operation of `metro.ops` beside its alternatives, forward and backward.

On the CPU in float32; on a GPU the operations with kernels in bf16, also beside torch.compile,
liger-kernel and cut-cross-entropy where they are installed. All of an operation are checked to
compute the same before they are timed, in turn.

Floors: `relative_position_attention` multiplies 7 times B H T S K (forward 2, backward 5 with the
scores computed again), a tenth of what a layer's matrices cost at 512 tokens; `dropout` reads and
writes each element once per pass; `feed_forward` multiplies 12 N D F; `linear_cross_entropy` and
`linear_sample_cross_entropy` 6 N V D, and 2 N V D more where logits are computed again. "kept" is
what autograd holds between the passes.

Of the original's fused extension `linear_cross_entropy` replaces `cross_entropy`,
`relative_position_attention` replaces `softmax_dropout`; for `layer_norm` PyTorch's own serves.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.common import print_table, write_results
from metro.ops.dropout import dropout
from metro.ops.feed_forward import feed_forward
from metro.ops.linear_cross_entropy import linear_cross_entropy
from metro.ops.linear_sample_cross_entropy import linear_sample_cross_entropy
from metro.ops.relative_position_attention import relative_position_attention

BATCH, HEADS, LENGTH, WIDTH = 4, 12, 512, 64
D, INNER, VOCAB_SIZE = HEADS * WIDTH, 3072, 32768


class Case(NamedTuple):
    """One operation on given inputs."""

    leaves: list[torch.Tensor]
    ways: dict[str, Callable[[], torch.Tensor]]
    """Name and function; the first one is what the others are compared with."""
    is_random: bool = False
    """Whether outputs differ, and are not compared."""


def attention_case(device: str, has_bias: bool, is_causal: bool) -> Case:
    q, k, v = (torch.randn(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
    bias = torch.randn(HEADS, 2 * LENGTH - 1) if has_bias else None
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]

    def run(impl):
        return relative_position_attention(
            q, k, v, bias, is_causal=is_causal, dropout=0.1, impl=impl
        )

    return Case(leaves, {impl: partial(run, impl) for impl in ("reference", "cached")}, True)


def dropout_case(device: str) -> Case:
    x = torch.randn(BATCH, LENGTH, D).requires_grad_()
    ways = {impl: partial(dropout, x, 0.1, impl=impl) for impl in ("reference", "bytes")}
    return Case([x], ways, is_random=True)


def feed_forward_case(device: str) -> Case:
    shapes = ((BATCH, LENGTH, D), (INNER, D), (INNER,), (D, INNER), (D,))
    leaves = [(torch.randn(shape) * 0.05).requires_grad_() for shape in shapes]
    impls = ("reference", "in_place")
    return Case(leaves, {impl: partial(feed_forward, *leaves, impl=impl) for impl in impls})


def projection_case(device: str, samples: bool) -> Case:
    """Tied projection of 1,024 tokens, on a GPU 8,192."""
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
    return Case(leaves, ways)


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
        "relative_position_attention, bias": partial(
            attention_case, has_bias=True, is_causal=False
        ),
        "relative_position_attention, causal": partial(
            attention_case, has_bias=False, is_causal=True
        ),
        "relative_position_attention, cross": partial(
            attention_case, has_bias=False, is_causal=False
        ),
        "dropout": dropout_case,
        "feed_forward": feed_forward_case,
        "linear_cross_entropy": partial(projection_case, samples=False),
        "linear_sample_cross_entropy": partial(projection_case, samples=True),
    },
    "cuda": {
        "linear_cross_entropy": partial(projection_case, samples=False),
        "linear_sample_cross_entropy": partial(projection_case, samples=True),
    },
}


def kept_bytes(run) -> int:
    """Bytes of the distinct tensors that the graph of `run()` holds."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storages.values())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run, leaves, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    output = run()
    torch.autograd.grad(output, leaves, torch.ones_like(output))
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run, leaves) -> int:
    """GPU memory of both passes, beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds_of(run, leaves, "cuda")
    return torch.cuda.max_memory_allocated() - before


def measure(name: str, case: Case, device: str, repeats: int) -> list[dict]:
    """A row for each way."""
    if not case.is_random:
        want, *others = (run().detach().float() for run in case.ways.values())
        tolerance = 1e-4 if device == "cpu" else 2e-2
        for way, got in zip(list(case.ways)[1:], others, strict=True):
            torch.testing.assert_close(
                got, want, rtol=tolerance, atol=tolerance, msg=lambda m, way=way: f"{way}: {m}"
            )
    times = {way: [] for way in case.ways}
    for _ in range(repeats + 1):
        for way, run in case.ways.items():
            times[way].append(seconds_of(run, case.leaves, device))
    medians = {way: statistics.median(values[1:]) for way, values in times.items()}
    first = next(iter(medians.values()))
    rows = []
    for way, run in case.ways.items():
        row = {"operation": name, "impl": way, "ms": medians[way] * 1e3}
        row["x first"] = first / medians[way]
        row["kept MiB"] = kept_bytes(run) / 2**20
        if device == "cuda":
            row["peak MiB"] = peak_bytes(run, case.leaves) / 2**20
        rows.append(row)
    return rows


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(CASES), default=default)
    parser.add_argument("--only", default="", help="operations whose name starts so")
    parser.add_argument("--repeats", type=int, default=9, help="runs of every way, in turn")
    args = parser.parse_args()
    rows = []
    for name, build in CASES[args.device].items():
        if name.startswith(args.only):
            torch.manual_seed(0)
            rows += measure(name, build(args.device), args.device, args.repeats)
    if not rows:
        raise SystemExit(f"no operation starts with {args.only!r}; use one of {list(CASES['cpu'])}")
    print_table(rows, f"B {BATCH}, H {HEADS}, T {LENGTH}, K {WIDTH}, V {VOCAB_SIZE}, median")
    if not args.only:
        write_results("ops" if args.device == "cpu" else "ops_gpu", rows)


if __name__ == "__main__":
    main()
