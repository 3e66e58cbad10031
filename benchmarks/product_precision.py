"""Error and speed of one product of a layer's size on a CPU, by the precision asked for.

``highest`` and ``medium`` are those of `torch.set_float32_matmul_precision`, ``bf16`` is of inputs
rounded to bfloat16. 1,024 x 768 numbers by 768 x 2,048, both normally distributed; the error is the
norm of the difference to float64's product over the norm of that. All take turns on one thread,
seconds are processor time, the best of many counts.

    python -m benchmarks.product_precision
"""

import math
import time

import torch

from benchmarks.common import print_table, write_results

ROWS, INNER, COLUMNS = 1024, 768, 2048
REPEATS = 40


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, weight = torch.randn(ROWS, INNER), torch.randn(COLUMNS, INNER)
    exact = x.double() @ weight.double().T
    rounded = x.bfloat16(), weight.bfloat16()
    ways = {
        "highest": ("highest", (x, weight)),
        "medium": ("medium", (x, weight)),
        "bf16": ("highest", rounded),
    }
    best, errors = dict.fromkeys(ways, math.inf), {}
    for _ in range(REPEATS):
        for way, (precision, inputs) in ways.items():
            torch.set_float32_matmul_precision(precision)
            start = time.process_time()
            product = torch.nn.functional.linear(*inputs)
            best[way] = min(best[way], time.process_time() - start)
            errors[way] = float((product - exact).norm() / exact.norm())
    flops = 2 * ROWS * INNER * COLUMNS
    rows = [
        {
            "precision": way,
            "GFLOP/s": flops / seconds / 1e9,
            "times as fast": best["highest"] / seconds,
            "relative error": errors[way],
        }
        for way, seconds in best.items()
    ]
    print_table(rows, f"{ROWS} x {INNER} by {INNER} x {COLUMNS}")
    facts = {"amx": torch.cpu._is_amx_tile_supported()}
    facts["avx512_bf16"] = torch.cpu._is_avx512_bf16_supported()
    write_results("product_precision", rows, threads=1, **facts)


if __name__ == "__main__":
    main()
