"""Does METRO train in bfloat16 on a CPU as in float32? Losses of 300 updates by `metro pretrain`.

    python -m benchmarks.precision_curves --data FOLDER

The folder is one of `metro prepare-text`. For each seed both precisions begin with the same weights
and see the same batches; two seeds in float32 show how far apart runs are that differ in nothing
that matters. Width 512, 2 + 2 layers, one of the auxiliary model, 512 tokens an update.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import measure_isolated, print_table, write_results

SIZES = dict(
    encoder_embed_dim=512, encoder_ffn_embed_dim=2048, encoder_layers=2, encoder_attention_heads=8
)
LAST = 50
"""Updates whose mean loss is the end of a curve."""


def train(data: str, precision: str, seed: int, num_updates: int) -> tuple[list[float], float]:
    """The loss of each update, and seconds of processor time."""
    import metro

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        metro.pretrain(
            config="metro_t5_tiny",
            data=data,
            output_dir=folder,
            precision=precision,
            seed=seed,
            max_update=num_updates,
            max_tokens=512,
            lr=5e-4,
            cpu=True,
            log_interval=1,
            save_interval_updates=0,
            disable_validation=True,
            report_to="none",
            **SIZES,
        )
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses, time.process_time() - start


def as_row(seed: int, curves: dict[str, list[float]], seconds: dict[str, float]) -> dict:
    """Both ends of a seed, how far the curves are apart, and the speed."""
    ends = {name: statistics.fmean(losses[-LAST:]) for name, losses in curves.items()}
    apart = [abs(a / b - 1) for a, b in zip(curves["bf16"], curves["fp32"], strict=True)]
    return {
        "seed": seed,
        "last losses, fp32": ends["fp32"],
        "last losses, bf16": ends["bf16"],
        "bf16 / fp32": ends["bf16"] / ends["fp32"],
        "mean difference of an update": statistics.fmean(apart),
        "times as fast": seconds["fp32"] / seconds["bf16"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of metro prepare-text")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    if not args.data:
        print("give --data, a folder of metro prepare-text")
        return
    rows, curves = [], {}
    for seed in args.seeds:
        given, seconds = {}, {}
        for precision in ("fp32", "bf16"):
            measured = measure_isolated(train, args.data, precision, seed, args.updates)
            given[precision], seconds[precision] = measured.value
        curves[str(seed)] = given
        rows.append(as_row(seed, given, seconds))
        write_results("precision_curves", rows, updates=args.updates, losses=curves)
    print_table(rows, f"METRO at width 512, {args.updates} updates")


if __name__ == "__main__":
    main()
