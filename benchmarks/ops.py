"""Speed and memory of each operation of `metro.ops` beside its reference, forward and backward.

Floors: `relative_position_attention` multiplies 7 times B H T S K (forward 2, backward 5 with the
scores computed again), a tenth of what a layer's matrices cost at 512 tokens; `dropout` reads and
writes each element once per pass. "kept" is what autograd holds between the passes.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from benchmarks.common import print_table, write_results
from metro.ops.dropout import dropout
from metro.ops.relative_position_attention import relative_position_attention

BATCH, HEADS, LENGTH, WIDTH = 4, 12, 512, 64


def attention_case(has_bias: bool, is_causal: bool):
    """Leaves, and a function from an implementation's name to the output."""
    q, k, v = (torch.randn(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
    bias = torch.randn(HEADS, 2 * LENGTH - 1) if has_bias else None
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    return leaves, lambda impl: relative_position_attention(
        q, k, v, bias, is_causal=is_causal, dropout=0.1, impl=impl
    )


def dropout_case():
    x = torch.randn(BATCH, LENGTH, HEADS * WIDTH).requires_grad_()
    return [x], lambda impl: dropout(x, 0.1, impl=impl)


CASES = {
    "relative_position_attention, bias": (partial(attention_case, True, False), "cached"),
    "relative_position_attention, causal": (partial(attention_case, False, True), "cached"),
    "relative_position_attention, cross": (partial(attention_case, False, False), "cached"),
    "dropout": (dropout_case, "bytes"),
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


def seconds_of(run, leaves) -> float:
    start = time.perf_counter()
    output = run()
    torch.autograd.grad(output, leaves, torch.ones_like(output))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="runs of either side, in turn")
    args = parser.parse_args()
    rows = []
    for name, (build, impl) in CASES.items():
        leaves, run = build()
        times = {"reference": [], impl: []}
        for _ in range(args.repeats + 1):
            for way in times:
                times[way].append(seconds_of(partial(run, way), leaves))
        medians = {way: statistics.median(values[1:]) for way, values in times.items()}
        for way in times:
            rows.append(
                {
                    "operation": name,
                    "impl": way,
                    "ms": medians[way] * 1e3,
                    "x reference": medians["reference"] / medians[way],
                    "kept MiB": kept_bytes(partial(run, way)) / 2**20,
                }
            )
    print_table(rows, f"B {BATCH}, H {HEADS}, T {LENGTH}, K {WIDTH}, dropout 0.1, median")
    write_results("ops", rows)


if __name__ == "__main__":
    main()
