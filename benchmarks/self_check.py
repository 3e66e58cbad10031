"""Every kernel beside its formula, by the check that runs before one is chosen.

    python -m benchmarks.self_check [--device cpu]

The fullest case of each operation in each type at the width of METRO-base, each in a process of its
own, as many at a time as half of the cores: a kernel that hangs or breaks the GPU's context costs
its own row. Writes ``self_check.json`` (GPU only: ``benchmarks/results`` has none of a CPU) after
each, and exits with status 1 where one has a fault. On the CPU, with TRITON_INTERPRET=1, small
inputs in float32, one at a time, tell whether the script works.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.common import measure_isolated, write_results

TYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32",)}


def try_kernel(op: str, dtype: str, device: str) -> str | None:
    """Say what is wrong with an operation's kernel; ``None``: nothing."""
    from metro.ops.kernels import self_check, trials

    width = trials.WIDTHS.get(op, 768)
    if device == "cpu":  # the interpreter takes long for each tile
        trials.KEYS, width = 130, 32
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    flags = trials.TRAINED[op][0]
    return self_check.find_fault(op, where, getattr(torch, dtype), width, flags)


def row_of(op: str, dtype: str, device: str) -> dict[str, Any]:
    """What was found of an operation in a type, and the seconds of it all."""
    start = time.perf_counter()
    try:
        fault = measure_isolated(try_kernel, op, dtype, device).value
    except RuntimeError as error:
        fault = str(error)
    seconds = time.perf_counter() - start
    return {"operation": op, "type": dtype, "fault": fault, "seconds": seconds}


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(TYPES), default=default)
    device = parser.parse_args().device
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("kernels run on a GPU, or on the CPU with TRITON_INTERPRET=1")
        return
    from metro.ops.kernels.trials import TRAINED

    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max(1, cores // 2) if device == "cuda" else 1) as pool:
        tried = [
            pool.submit(row_of, op, dtype, device) for dtype in TYPES[device] for op in TRAINED
        ]
        for each in as_completed(tried):
            rows.append(row := each.result())
            print(f"{row['operation']}, {row['type']}: {row['fault'] or 'ok'}", flush=True)
            write_results("self_check", rows, tried=len(rows), of=len(tried))
    if any(row["fault"] for row in rows):
        raise SystemExit("kernels with a fault are named above")


if __name__ == "__main__":
    main()
