"""Where the time goes at the base's size: one METRO step, evaluation and one FLIPPED update.

    python -m benchmarks.time_by_part

Layers as in METRO-base (12 + 12 of width 768), on one thread, in float32 and in bf16. The step is
that of `pretraining.py` with its optimizer, the evaluation that of `evaluation.py` on rows of
HellaSwag, which take most of the time of T0's suite, the update that of `flipped_training.py` with
Adafactor, of 20 examples.

Seconds are those of PyTorch's operations themselves, as its profiler sees them, on the second time.
Each belongs to the part that called it; ``products`` are those with weights outside of attention,
feed-forward networks and the vocabulary. ``floor s`` is what a part's matrix products, with those
computed once more on the way back, take at the speed of one large product of the same type,
measured in the same process; a causal product counts in full. Parts without products wait for
memory: `ops.py` measures each beside the bytes that it has to move.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import evaluation, flipped_training, pretraining
from benchmarks.common import measure_isolated, print_table, write_results
from benchmarks.timing import subject_on
from metro.training.memory import reserve_heap

LAYERS, WIDTH = 12, 768
ROWS, EXAMPLES = 16, 20
PARTS = {
    "CachedAttention": "attention",
    "aten::scaled_dot_product_attention": "attention",
    "InPlaceFeedForward": "feed-forward",
    "ChunkedCrossEntropy": "vocabulary",
    "DropoutAddLayerNorm": "dropout, residual, LayerNorm",
    "aten::layer_norm": "dropout, residual, LayerNorm",
    "BitDropout": "dropout, residual, LayerNorm",
    "vocabulary": "vocabulary",
    "optimizer": "optimizer",
}
"""By how the name of a function begins, in which an operation runs; both passes have it."""
FACTORS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Which inputs of a matrix product are multiplied."""
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def product_flops(event) -> int:
    """Multiplications and additions of a matrix product or of attention; 0 of anything else."""
    shapes = event.input_shapes
    if event.name == FLASH:
        return 4 * prod(shapes[0]) * shapes[1][2]
    if factors := FACTORS.get(event.name.removeprefix("aten::")):
        left, right = (shapes[i] for i in factors)
        return 2 * prod(left) * right[-1]
    return 0


def part_of(event) -> str:
    """The part of the outermost function that has one."""
    part = "products" if event.name.removeprefix("aten::") in FACTORS else "the rest"
    caller = event
    while caller is not None:
        part = next((PARTS[start] for start in PARTS if caller.name.startswith(start)), part)
        caller = caller.cpu_parent
    return part


def by_part(run: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds and FLOPs of each part of a second run."""
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        of_part = sums[part_of(event)]
        of_part[0] += event.self_cpu_time_total / 1e6
        of_part[1] += product_flops(event)
    return dict(sums)


def pretraining_step(in_bf16: bool) -> Callable[[], None]:
    """A step of METRO-base on 6 samples of 512 tokens."""
    model, loss_of = pretraining.build_step("metro bf16" if in_bf16 else "metro", "base", 0.1)
    optimizer = pretraining.Optimizer(model)
    batch = pretraining.metro_batch(6, padded=False)

    def run() -> None:
        loss_of(batch).backward()
        with record_function("optimizer"):
            optimizer.step()

    return run


def evaluation_of_rows(in_bf16: bool) -> Callable[[], object]:
    """HellaSwag's first prompt on some rows."""
    from metro.data.prompts.encoding import PromptEncoder
    from metro.evaluation.scoring import target_projection
    from metro.evaluation.tasks.loading import Sources, load_tasks
    from metro.evaluation.tasks.suites import find_suite

    shared = evaluation.SHARED
    vocabulary = shared / "vocab" / "vocab_32k"
    model, _, tokenizer = evaluation.make_model(vocabulary, LAYERS, WIDTH, "cpu")
    model = model.bfloat16() if in_bf16 else model
    project = target_projection.target_log_probabilities

    def projected(*inputs):
        with record_function("vocabulary"):
            return project(*inputs)

    target_projection.target_log_probabilities = projected
    tasks, _ = load_tasks(
        find_suite("t0"), Sources(shared / "data", shared / "prompts", limit=ROWS)
    )
    task = next(task for task in tasks if task.name == "hellaswag")
    examples = task.examples(task.prompts[0], flipped=False).examples
    return partial(evaluation.our_way, model, PromptEncoder(tokenizer), examples, "direct")


def flipped_update(in_bf16: bool) -> Callable[[], None]:
    """A FLIPPED update of METRO-T5 on examples of median length."""
    from transformers.optimization import Adafactor

    sizes = dict(d_model=WIDTH, d_ff=4 * WIDTH, num_layers=LAYERS, num_heads=WIDTH // 64)
    model, fuse = flipped_training.build_model("METRO-T5", **sizes)
    fuse(model.train())
    optimizer = Adafactor(model.parameters(), lr=5e-5, scale_parameter=False, relative_step=False)
    examples = sorted(flipped_training.draw_examples(3 * EXAMPLES), key=lambda x: len(x[0]))

    def run() -> None:
        optimizer.zero_grad()
        flipped_training.our_backward(model, examples[EXAMPLES : 2 * EXAMPLES], in_bf16)
        with record_function("optimizer"):
            optimizer.step()

    return run


JOBS = {
    "METRO-base pretraining": pretraining_step,
    "evaluation, HellaSwag": evaluation_of_rows,
    "FLIPPED training": flipped_update,
}


def measure(job: str, in_bf16: bool) -> list[dict]:
    """A row per part, the longest first, and one of all."""
    torch.set_num_threads(1)
    if not job.startswith("evaluation"):
        reserve_heap()
    rate = evaluation.product_speed(WIDTH, "cpu", torch.bfloat16 if in_bf16 else torch.float32)
    run = JOBS[job](in_bf16)
    parts = dict(sorted(by_part(run).items(), key=lambda item: -item[1][0]))
    parts["all"] = [sum(column) for column in zip(*parts.values(), strict=True)]
    total, _ = parts["all"]
    return [
        {"job": job, "METRO in": "bf16" if in_bf16 else "float32", "part": part,
         "seconds": seconds, "share": seconds / total, "floor s": flops / rate if flops else None}
        for part, (seconds, flops) in parts.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    options = parser.parse_args()
    rows = []
    for job in options.jobs:
        for in_bf16 in (False, True):
            rows += measure_isolated(measure, job, in_bf16).value
            write_results(subject_on("cpu", "time_by_part"), rows, threads=1)
    print_table(rows, "where the time goes")


if __name__ == "__main__":
    main()
