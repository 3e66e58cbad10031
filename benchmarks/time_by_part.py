"""Where the time goes at the base's size: one METRO step, evaluation and one FLIPPED update.

    python -m benchmarks.time_by_part

Layers as in METRO-base (12 + 12 of width 768), on one thread, in float32 and in bf16. The step is
that of `pretraining.py` with its optimizer, the evaluation that of `evaluation.py` on rows of
HellaSwag, which take most of the time of T0's suite, the update that of `flipped_training.py` with
Adafactor, of 20 examples.

A part's seconds are those of PyTorch's operations themselves, as its profiler sees them. Each
belongs to the part that called it, and so does its way back. ``products`` are those with weights
outside of attention, feed-forward networks (which count there in evaluation) and the vocabulary;
``outside of PyTorch`` is what the process took besides: Python, NumPy's random numbers, and the
profiler. ``floor s`` is what a part's matrix products, with those computed once more on the way
back, take at the speed of one large product of the same type, measured in the same process;
PyTorch's causal attention counts in full.
Parts without products wait for memory: `ops.py` measures each beside the bytes that it has to move.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import evaluation, flipped_training, pretraining
from benchmarks.common import measure_isolated, print_table, write_results
from benchmarks.timing import seconds_now, subject_on
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


def by_part(run: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds and FLOPs of each part of a second run."""
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = seconds_now("cpu")
        run()
        total = seconds_now("cpu") - started
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event, part in parts_of(profiler):
        sums[part][0] += event.self_cpu_time_total / 1e6
        sums[part][1] += product_flops(event)
    sums["outside of PyTorch"] = [total - sum(seconds for seconds, _ in sums.values()), 0.0]
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
    jobs = list(JOBS)
    if not evaluation.SHARED.is_dir():
        print(f"no data in {evaluation.SHARED}, nothing is evaluated; set METRO_TESTDATA")
        jobs.remove("evaluation, HellaSwag")
    rows = []
    for job in jobs:
        for in_bf16 in (False, True):
            rows += measure_isolated(measure, job, in_bf16).value
    print_table(rows, "where the time goes")
    sizes = dict(layers=LAYERS, width=WIDTH, rows_evaluated=ROWS, examples=EXAMPLES)
    write_results(subject_on("cpu", "time_by_part"), rows, threads=1, **sizes)


if __name__ == "__main__":
    main()
