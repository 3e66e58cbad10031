"""Speed of a METRO step in bfloat16 beside float32 on a CPU, by the width of the model.

What `metro pretrain --precision auto` goes by (:mod:`metro.training.precision`). Two layers in each
stack and one of the auxiliary model, 2,048 tokens a step in samples of 128, a vocabulary of 8,704;
both precisions take turns, seconds are processor time, the best step counts. CPUs with AMX have a
file of results of their own.
"""

import argparse
import math
import time

import torch

from benchmarks.common import print_table, write_results
from benchmarks.pretraining import Optimizer, metro_batch
from benchmarks.timing import subject_on
from metro.fusion import fuse
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel

LENGTH, SENTINEL = 128, 8192
WIDTHS = (64, 128, 256, 512, 768)


def compare(width: int, num_steps: int) -> dict:
    """Seconds of the best step in both precisions, after one to warm up."""
    torch.manual_seed(0)
    sizes = dict(d_kv=min(width // 4, 64), num_heads=max(width // 64, 4), d_ff=4 * width)
    config = MetroT5Config(vocab_size=SENTINEL + 512, d_model=width, num_layers=2, **sizes)
    model = fuse(MetroPretrainingModel(config, MetroPretrainingConfig(1)).train())
    batch = metro_batch(16, padded=False, length=LENGTH, sentinel=SENTINEL)
    optimizer, best = Optimizer(model), {"fp32": math.inf, "bf16": math.inf}
    for number in range(num_steps + 1):
        for name in best:
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                loss = model(**batch, objective=MetroObjective(weighted_lm=True)).total
            loss.backward()
            optimizer.step()
            if number:
                best[name] = min(best[name], time.process_time() - start)
    row = {"width": width, "fp32 s": best["fp32"], "bf16 s": best["bf16"]}
    return row | {"times as fast": best["fp32"] / best["bf16"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    args = parser.parse_args()
    rows = []
    for width in args.widths:
        rows.append(compare(width, args.steps))
        has_amx = torch.cpu._is_amx_tile_supported()
        write_results(
            subject_on("cpu", "precision"), rows, threads=torch.get_num_threads(), amx=has_amx
        )
    print_table(rows, "a METRO step in bf16 beside fp32")


if __name__ == "__main__":
    main()
