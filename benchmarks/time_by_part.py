"""Where the time goes at the base's size: one METRO step, evaluation and one FLIPPED update.

    python -m benchmarks.time_by_part

Layers as in METRO-base (12 + 12 of width 768), on one thread, in float32 and in bf16. The step is
that of `pretraining.py` with its optimizer, the evaluation that of `evaluation.py` on rows of some
of T0's sets: HellaSwag, which takes most of the suite's time, ANLI with its long inputs, and
Winogrande with short ones and two choices. The update is that of `flipped_training.py` with
Adafactor, of 20 examples.

A part's seconds are those of PyTorch's operations themselves by the clock, as its profiler sees
them: other work on the machine counts, which it does not in floors. Each operation belongs to the
part that called it, and so does its way back. ``products`` are those with weights outside of
attention, feed-forward networks (which count there in evaluation) and the vocabulary; ``outside of
PyTorch`` is what the process took besides: Python, NumPy's random numbers, and the profiler. ``in
products s`` is the time of matrix products and of PyTorch's attention.

``floor s`` is what a part's matrix products, with those computed once more on the way back, take at
the speed of one large product of the same type, measured in the same process; PyTorch's causal
attention counts in full. Of LayerNorm, dropout and the optimizer it is what their bytes take, read
and written once, at the rate of ``x += y``; of dropout without its random numbers.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import evaluation, flipped_training, pretraining
from benchmarks.common import measure_isolated, print_table, write_results
from benchmarks.timing import measure_rates, subject_on
from metro.training.memory import reserve_heap

LAYERS, WIDTH = 12, 768
ROWS, EXAMPLES = 16, 20
PARTS = {
    "CachedAttention": "attention",
    "aten::scaled_dot_product_attention": "attention",
    "InPlaceFeedForward": "feed-forward",
    "ChunkedCrossEntropy": "vocabulary",
    "vocabulary": "vocabulary",
    "BitDropout": "dropout",
    "aten::layer_norm": "LayerNorm",
    "optimizer": "optimizer",
}
"""By how the name of a function begins, in which an operation runs."""
FACTORS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Which inputs of a matrix product are multiplied."""
LINEAR = "mkldnn::_linear_pointwise"
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "autograd::engine::evaluate_function: "
MOVED = {"aten::native_layer_norm": 2, "aten::native_layer_norm_backward": 3, "BitDropout": 2}
"""How often as many bytes as its first input has must be read or written."""
ITEM_BYTES = {"float": 4, "c10::BFloat16": 2}


def factors_of(event) -> tuple[int, int] | None:
    return FACTORS.get(event.name.removeprefix("aten::").removesuffix("_"))


def is_product(event) -> bool:
    return event.name == LINEAR or factors_of(event) is not None


def product_flops(event) -> int:
    """Multiplications and additions of a matrix product or of attention; 0 of anything else."""
    shapes = event.input_shapes
    if event.name == FLASH:
        return 4 * prod(shapes[0]) * shapes[1][2]
    if event.name == LINEAR:
        return 2 * prod(shapes[0]) * shapes[1][0]
    if factors := factors_of(event):
        left, right = (shapes[i] for i in factors)
        return 2 * prod(left) * right[-1]
    return 0


def moved_bytes(event) -> int:
    """Bytes that LayerNorm and dropout must move; 0 of anything else."""
    if event.name not in MOVED:
        return 0
    return MOVED[event.name] * prod(event.input_shapes[0]) * ITEM_BYTES[event.input_dtypes[0]]


def part_of(event, forward_parts: dict[int, str]) -> str:
    """The part of the outermost caller that has one; going back, that of the way forward.

    ``forward_parts``: by the number of the node in the graph.
    """
    part = "products" if is_product(event) else "the rest"
    caller = event
    while caller is not None:
        part = next((PARTS[start] for start in PARTS if caller.name.startswith(start)), part)
        if caller.name.startswith(BACKWARD):
            part = forward_parts.get(caller.sequence_nr, part)
        caller = caller.cpu_parent
    return part


def parts_of(profiler) -> Iterator[tuple[Any, str]]:
    """Each event of a profile, with its part."""
    forward_parts: dict[int, str] = {}
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        part = part_of(event, forward_parts)
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and part != "the rest":
            forward_parts[event.sequence_nr] = part  # the last to start made the node
        yield event, part


@dataclass
class Sums:
    """What a part takes, and what it must compute and move."""

    seconds: float = 0.0
    in_products: float = 0.0
    """Seconds of matrix products and of PyTorch's attention."""
    flops: float = 0.0
    moved: float = 0.0
    """Bytes of LayerNorm, dropout and the optimizer."""


def by_part(run: Callable[[], object]) -> dict[str, Sums]:
    """Sums of each part of a second run; seconds are of the clock, as the profiler's are."""
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        run()
        total = time.perf_counter() - started
    sums: dict[str, Sums] = defaultdict(Sums)
    for event, part in parts_of(profiler):
        seconds, flops = event.self_cpu_time_total / 1e6, product_flops(event)
        sums[part].seconds += seconds
        sums[part].in_products += seconds * (flops > 0)
        sums[part].flops += flops
        sums[part].moved += moved_bytes(event)
    sums["outside of PyTorch"] = Sums(total - sum(part.seconds for part in sums.values()))
    return dict(sums)


Job = tuple[Callable[[], object], float]
"""What is run, and the bytes that its optimizer must move."""


def bytes_of(parameters, times: int) -> float:
    """Of as many float32 numbers for each parameter."""
    return 4.0 * times * sum(p.numel() for p in parameters if p.requires_grad)


def pretraining_step(in_bf16: bool) -> Job:
    """A step of METRO-base on 6 samples of 512 tokens.

    AdamW reads a weight, its gradient and two moments, and writes all but the gradient.
    """
    model, loss_of = pretraining.build_step("metro bf16" if in_bf16 else "metro", "base", 0.1)
    optimizer = pretraining.Optimizer(model)
    batch = pretraining.metro_batch(6, padded=False)

    def run() -> None:
        loss_of(batch).backward()
        with record_function("optimizer"):
            optimizer.step()

    return run, bytes_of(model.parameters(), 7)


def evaluation_of(name: str, in_bf16: bool) -> Job:
    """The first prompt of a set of T0 on some rows."""
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
    task = next(task for task in tasks if task.name == name)
    examples = task.examples(task.prompts[0], flipped=False).examples
    return partial(evaluation.our_way, model, PromptEncoder(tokenizer), examples, "direct"), 0.0


def flipped_update(in_bf16: bool) -> Job:
    """A FLIPPED update of METRO-T5 on examples of median length.

    Adafactor reads a weight and its gradient, and writes the weight; its state is small.
    """
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

    return run, bytes_of(model.parameters(), 3)


JOBS: dict[str, Callable[[bool], Job]] = {
    "METRO-base pretraining": pretraining_step,
    "evaluation, HellaSwag": partial(evaluation_of, "hellaswag"),
    "evaluation, ANLI r1": partial(evaluation_of, "anli_r1"),
    "evaluation, Winogrande": partial(evaluation_of, "winogrande"),
    "FLIPPED training": flipped_update,
}


def measure(job: str, in_bf16: bool) -> list[dict]:
    """A row per part, the longest first, and one of all."""
    torch.set_num_threads(1)
    if not job.startswith("evaluation"):
        reserve_heap()
    rate = evaluation.product_speed(WIDTH, "cpu", torch.bfloat16 if in_bf16 else torch.float32)
    _, bytes_per_second = measure_rates("cpu")
    run, optimizer_bytes = JOBS[job](in_bf16)
    parts = by_part(run)
    if optimizer_bytes:
        parts["optimizer"].moved += optimizer_bytes
    total = sum(part.seconds for part in parts.values())
    given = {"job": job, "METRO in": "bf16" if in_bf16 else "float32"}
    rows: list[dict] = []
    for name, part in sorted(parts.items(), key=lambda item: -item[1].seconds):
        floor = part.flops / rate + part.moved / bytes_per_second
        row = {"part": name, "seconds": part.seconds, "share": part.seconds / total}
        row |= {"in products s": part.in_products or None, "floor s": floor or None}
        rows.append(given | row)
    of_all = {key: sum(row[key] or 0.0 for row in rows) for key in ("in products s", "floor s")}
    return [*rows, given | {"part": "all", "seconds": total, "share": 1.0} | of_all]


def main() -> None:
    jobs = list(JOBS)
    if not evaluation.SHARED.is_dir():
        print(f"no data in {evaluation.SHARED}, nothing is evaluated; set METRO_TESTDATA")
        jobs = [job for job in jobs if not job.startswith("evaluation")]
    rows = []
    for job in jobs:
        for in_bf16 in (False, True):
            rows += measure_isolated(measure, job, in_bf16).value
    print_table(rows, "where the time goes")
    sizes = dict(layers=LAYERS, width=WIDTH, rows_evaluated=ROWS, examples=EXAMPLES)
    write_results(subject_on("cpu", "time_by_part"), rows, threads=1, **sizes)


if __name__ == "__main__":
    main()
