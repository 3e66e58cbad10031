"""The prose of docs/performance.md, with its numbers from the JSON of the benchmarks."""

import textwrap
from typing import Any

INTRO = """\
# Performance

<!-- written by `python -m benchmarks.page` from benchmarks/results/*.json -->

How fast METRO is beside the way the published code does the same work: both ran in one benchmark on
the same cores. On a CPU the published way computes in float32. So does METRO in the rows of
float32, where the benchmarks check that both get the same losses, predictions or files. In the rows
of bf16 METRO does the same work in bfloat16, beside the same published way in float32: what it gets
is the same only up to that rounding.
"""
NO_GPU = "\nOn a GPU nothing has been measured yet.\n"
ON_GPU = "\nOn a GPU both compute in bf16.\n"
PRECISION = """\
## Precision

On a CPU, products of bfloat16 are several times as fast as those of float32 where it has AMX
(Intel's server CPUs since Sapphire Rapids), and twice as fast with AVX512_BF16 (AMD's since Zen 4).
`metro pretrain` and `metro finetune` use them there by autocast for models of width 256 and more
(`--precision auto`, the default, and the log says so): weights, sums, LayerNorm and the optimizer
stay in float32, attention's scores of long sequences are rounded. CPU features decide, not a
measurement, so that a machine always trains the same way; `--precision fp32` turns it off, `bf16`
demands it. On other CPUs `auto` is float32. fairseq has switches of its own (`--bf16` rounds the
weights as well).

`metro evaluate`, `rank`, `flip` and `generate` have the same switch, also named `--dtype`, which
there is the type of weights and products (of attention's on CPUs with AMX only). The first three
compute in float32 unless told otherwise, on GPUs too: published numbers are compared with to a
tenth of a point, and a rounded score can turn a close decision. `--precision fast` takes bf16 on
such CPUs and on GPUs that have it, elsewhere float32; the log of `evaluate` and `rank` names the
type, and where `fast` would be another one of a wide model, that too. `generate` is fast on a GPU
by itself. In these four `auto` is not the fast type, as in training, but the one that the model was
saved in.
"""
WITHOUT_AMX = """\
## Without AMX

The same on a CPU with AVX512_BF16, where bf16 is about twice as fast as float32.
"""
MEMORY = """\
## Memory of a CPU

An update takes and frees as much memory as the one before. By itself glibc has Linux take and give
that of large tensors each time, filled with zeros, in pages of 4 kB. A training by METRO takes all
of it from one heap, in pages of 2 MB where the system has them, and keeps it for the next update;
what lies in gaps between tensors is given back when the process has grown to more than nine eighths
of what an update needs. That changes no result. What it gains depends on how fast a system gives
memory: the virtual machines measured here are slow at it, and not always equally, so that the
published way's own speed differs by a tenth and more between runs of a benchmark.

It takes glibc 2.33 or later, no limit on addresses (`ulimit -v`), and no settings of malloc in the
environment: `MALLOC_TRIM_THRESHOLD_`, say, turns it off. `top` shows addresses for all of the
machine's memory in VIRT; what is taken is RES.
"""


def filled(text: str, indent: str = "") -> str:
    """A paragraph in lines of at most 100 characters."""
    options = dict(break_on_hyphens=False, break_long_words=False)
    return textwrap.fill(" ".join(text.split()), 100, subsequent_indent=indent, **options) + "\n"


def age(results: dict[str, dict]) -> str:
    """Which results of models are older than the same of another CPU."""
    older = []
    for subject in ("pretraining", "evaluation", "flipped_training"):
        dates = [results.get(subject + of, {}).get("date", "") for of in ("", "_without_amx")]
        if "" < dates[0] < dates[1]:
            older.append(f"{subject.replace('_', ' ')}, {dates[0]}")
    if not older:
        return ""
    return "\n" + filled(
        f"""Results of a CPU with AMX are older than those [without](#without-amx), and METRO was as
        it was then: {"; ".join(older)}."""
    )


def evaluated(result: dict) -> str:
    """What an evaluation was of."""
    return (
        f"{result['layers']} + {result['layers']} layers of width {result['width']} with random "
        f"weights; prompts of each of T0's sets: {result['prompts_per_task']}, rows: at most "
        f"{result['rows_per_task']}."
    )


def sizes(results: dict[str, dict]) -> str:
    """What the rows of the first table are of."""
    pretraining, evaluation = results["pretraining"], results["evaluation"]
    steps = min(len(run["seconds"]) for runs in pretraining["runs"].values() for run in runs)
    measured, whole = measured_and_whole(evaluation["rows"])
    suite = whole_suite(evaluation)
    lines = (
        f"""**METRO-base, T5-base:** 12 + 12 layers of width 768, and the 4 layers of METRO's
        auxiliary model; {pretraining["batch_size"]} samples of 512 tokens a step, {steps} timed
        step{"s" * (steps > 1)} of each way once warm, one thread.""",
        f"""**Evaluation:** {evaluated(evaluation)} From these {measured:,} examples the speed over
        all {whole:,} (rows times prompts) is projected. Of the {measured:,} predictions METRO in
        float32 changes {suite["different_predictions"]}, in bf16 {suite["bf16_different"]}.""",
        f"""**FLIPPED:** 4 + 4 layers of width 256, {results["flipped_training"]["batch_size"]}
        examples an update. These speeds are by processor time;
        [below](#flipped-training-with-amx) they are by the clock, too.""",
        """**metro prepare-text, prepare-prompts:** whole commands, start-up included.""",
    )
    return "".join(filled("- " + line, "  ") for line in lines)


def shown(number: float) -> str:
    return f"{number:.3g}"


def whole_suite(result: dict) -> dict[str, Any]:
    """The row of an evaluation that is projected to all of T0's sets."""
    return next(row for row in result["rows"] if row["task"] == "whole suite")


def measured_and_whole(rows: list[dict]) -> tuple[int, int]:
    """Examples that the evaluation measured, and those of the whole suite."""
    count = {row["task"]: row["examples"] for row in rows if row["method"] == rows[0]["method"]}
    return count["all"], count["whole suite"]


def floors(results: dict[str, dict]) -> str:
    """What the floor is, and why times are what they are beside it."""
    pretraining = results["pretraining"]
    tokens = 512 * pretraining["batch_size"]
    rows = {row["way"]: row for row in pretraining["rows"]}
    times = []
    for way in ("metro", "metro bf16"):
        seconds = tokens / rows[way]["tokens/s"]
        products = seconds * rows[way]["of matrix peak"]
        times.append([f"{each:.1f}" for each in (seconds, products, seconds - products)])
    (step, products, rest), (step_bf16, products_bf16, rest_bf16) = times
    floor = filled(
        """"At the floor" is how many times as fast as the published way those products alone would
        be that no way can do without, at the speed of one large product in METRO's type, measured
        in the same run. It is an estimate, as the speed of a product depends on its sizes. Where a
        cell is empty, none was made."""
    )
    beyond = filled(
        f"""A step of METRO-base takes {step} s in float32, of which {products} are the floor, and
        {step_bf16} s in bf16, of which {products_bf16} are. The rest, {rest} and {rest_bf16} s, is
        softmax, LayerNorm, ReLU, dropout, the optimizer, rounding, and that a layer's products run
        slower than the large one: it hardly shrinks in bf16, which is why times are further from
        the floor there."""
    )
    return f"{floor}\n{beyond}"


def precision(results: dict[str, dict]) -> str:
    """The prose on precision, and how fast products are by it."""
    pretraining, evaluation = results["pretraining"], results["evaluation"]
    ratios = [
        pretraining["bf16_peak_tflops"] / pretraining["matrix_peak_tflops"],
        evaluation["bf16_gflops_per_second"] / evaluation["gflops_per_second"],
    ]
    low, high = sorted(f"{ratio:.2g}" for ratio in ratios)
    of = {row["precision"]: row for row in results["product_precision"]["rows"]}
    medium, error = of["medium"], "relative error"
    said = filled(
        f"""One large product was {low} to {high} times as fast in bf16 as in float32 with AMX, and
        {of["bf16"]["times as fast"]:.2g} times with AVX512_BF16. There is no switch for
        `torch.set_float32_matmul_precision("medium")`, which lets oneDNN round to bf16 where that
        is fast: what is rounded depends on the CPU, and no log would say so. With AVX512_BF16 it
        keeps float32 (error {medium[error]:.2g}, without it {of["highest"][error]:.2g}) and is
        {shown(medium["times as fast"])} times as fast, as PyTorch asks oneDNN then instead of MKL.
        METRO's [operations](operations.md) ask oneDNN themselves on AMD's CPUs, always in float32,
        for weights of 131,072 numbers and more."""
    )
    return f"{PRECISION}\n{said}\n"


def memory(results: dict[str, dict]) -> str:
    """What keeping memory is worth to both ways."""
    said = ""
    for subject, where in (("pretraining", "with AMX"), ("pretraining_without_amx", "without AMX")):
        rows = {row["way"]: row["tokens/s"] for row in results.get(subject, {"rows": []})["rows"]}
        if kept := rows.get("plain, heap kept"):
            said += f"""METRO-base, {where}: with its heap kept the published way itself is
                {shown(kept / rows["plain"])} times as fast, and beside that METRO is
                {shown(rows["metro"] / kept)} times as fast in float32 and
                {shown(rows["metro bf16"] / kept)} times in bf16. """
    ways = {row["way"] for row in results["pretraining"]["rows"]}
    if "plain, heap kept" not in ways:
        said += """The results with AMX are older: there METRO took pages of 2 MB, as "plain, huge
            pages" did, and gave large tensors back as soon as they were freed."""
    return f"{MEMORY}\n{filled(said)}\n"


def of_precision_curves(result: dict) -> str:
    return filled(
        f"""METRO with layers of width 512, trained by `metro pretrain` for {result["updates"]}
        updates of 512 tokens. For each seed both precisions begin with the same weights and see the
        same batches; last losses are means of the last 50 updates."""
    )


def of_pretraining(result: dict) -> str:
    """How far steps of one way differ."""
    of_way = (
        f"{way} {', '.join(map(shown, run['seconds']))}"
        for way, runs in result["runs"].items()
        for run in runs
    )
    return filled(f"Seconds of the timed steps, whose median counts: {'; '.join(of_way)}.")


def of_gpu_pretraining(result: dict) -> str:
    return filled(
        f"""METRO-{result["size"]} in bf16 with an optimizer in float32; {result["batch_size"]}
        samples of 512 tokens a step. Without padding, and with samples of half to full length.
        Here METRO takes every kernel that proves itself; by default it takes only those measured to
        be faster (`METRO_TRITON=1`: all)."""
    )


def without_amx(results: dict[str, dict]) -> str:
    """What stands above the table of such a CPU, and what of it is not as with AMX."""
    model, other = (results.get(f"evaluation{of}", {}) for of in ("", "_without_amx"))
    said = ""
    if model and other and model["width"] != other["width"]:
        said = f"""Evaluation is not of the same model as above but of {evaluated(other)} The larger
            a model, the more of METRO's time are products."""
    if small := results.get("evaluation_6_384_without_amx"):
        whole = whole_suite(small)
        said += f""" A model of {small["layers"]} + {small["layers"]} layers of width
            {small["width"]}, of which the target was judged before, is evaluated
            {shown(whole["speedup"])} times as fast in float32 and {shown(whole["bf16_speedup"])}
            times in bf16, which misses the target of 8 x: whether it is met depends on the size."""
    return WITHOUT_AMX + (f"\n{filled(said)}" if said else "")


def of_evaluation(result: dict) -> str:
    return filled(evaluated(result))


def of_gpu_evaluation(result: dict) -> str:
    said = "Both ways compute in bf16, each with roundings of its own."
    return filled(f"{evaluated(result)} {said}")


def of_curves(result: dict) -> str:
    """Whether fused and plain training agree, and METRO and the published way."""
    steps = len(next(iter(result["losses"].values())))
    text = (
        f"METRO-{result['size']} trained from the same weights on the same {result['batch_size']} "
        f"samples of 512 tokens, {steps} steps, no dropout."
    )
    if "allowed" in result:
        text += (
            f" Fused and plain differ by {result['relative_difference']:.2g} at most; "
            f"{result['allowed']:.2g} may be"
        )
        on_gpu = "plain float32" in result["losses"]
        text += ", twice what rounding does to the plain one." if on_gpu else "."
    for what, difference in result.get("loss_differences", {}).items():
        text += (
            f" The loss of one step of {what} in float32 and that of the published way are apart "
            f"by {difference:.2g}; 1e-05 may be."
        )
    return filled(text + "".join(f" NOT so: {failure}." for failure in result["failures"]))


def of_startup(result: dict) -> str:
    return filled(
        f"""Processor seconds of a process, median of {result["repeats"]}, with a tiny METRO model.
        The first rows are imports alone, the third that of a script with T5: most of what a command
        takes to start are PyTorch and transformers. `metro doctor` imports every package to say
        which ones work. `metro templates`, which waits for a download, is left out."""
    )


def of_flipped(result: dict) -> str:
    return filled(
        f"""{result["updates"]} updates, after one that is not timed; METRO computes 10 examples at
        a time, the published way one. Where speeds by the clock and by processor time differ, other
        work had the cores. The loss is of the first update: METRO's has to be within 1e-4 of the
        published way's, in bf16 within 1 %."""
    )


def of_time_by_part(result: dict) -> str:
    """What the columns are, and why parts are above their floors."""
    step = ("METRO-base pretraining", "bf16")
    small = sum(
        row["share"]
        for row in result["rows"]
        if (row["job"], row["METRO in"]) == step
        and row["part"] in ("LayerNorm", "dropout", "optimizer")
    )
    layers = f"{result['layers']} + {result['layers']} layers of width {result['width']}"
    columns = filled(
        f"""One METRO-base step, {result["rows_evaluated"]} rows of each of three of T0's sets and
        a FLIPPED update of {result["examples"]} examples, all with {layers}. `products` are those
        with weights outside of the other parts, in evaluation also those of feed-forward layers.
        `in products s` is the time in matrix products and in PyTorch's attention. `floor s` is what
        a part's matrix products take at the speed of one large product; of LayerNorm, dropout and
        the optimizer, what it takes to read and write their numbers once."""
    )
    reasons = filled(
        f"""More than a tenth above the floor are attention, the vocabulary, feed-forward layers,
        small batches and what has no products. Attention's products are small, those of one head of
        one sequence, and softmax and dropout touch every weight; without AMX PyTorch's has no
        products in bf16, and where a bias has a gradient, as in FLIPPED's encoder, it keeps all
        weights. No cache holds the vocabulary's weights, 100 MB, which meet few rows at a time, and
        its exponentials are computed in float32, on each way. Feed-forward layers also have their
        activation's gradient, sums for that of the bias and, in bf16, weights to round. Winogrande
        has few tokens a batch. LayerNorm, dropout and the optimizer, {100 * small:.1f} % of METRO's
        step in bf16, are not bound by memory: PyTorch's LayerNorm and the random numbers of dropout
        are work of the processor, and Adafactor, which is that of transformers, passes over memory
        many times."""
    )
    return f"{columns}\n{reasons}"


def of_ops(result: dict) -> str:
    """What is to be known about the rows of operations."""
    from benchmarks.ops import cases

    names = {row["operation"] for row in result["rows"]}
    text = (
        "`x first` compares with an operation's first row; `of floor` is the floor's share. On a "
        "CPU the rest is, of attention and the cross-entropies, whose floor are their products, "
        "softmax and dropout on every weight or logit, and of dropout drawing random numbers, "
        "which takes longer than moving the bytes."
    )
    if others := names - set(cases("cpu")):
        text += (
            f" The rows are older than the benchmark: {len(others)} of their {len(names)} cases "
            "it measures in another form now."
        )
    if any((row["of floor"] or 0) > 1 for row in result["rows"]):
        text += (
            " Where a share exceeds 1 the floor is wrong: the addition that the rate of memory was "
            "taken from moved fewer bytes a second than the operation."
        )
    if any(row.get("impl") == "in_place" and row["x first"] < 1 for row in result["rows"]):
        text += (
            " `feed_forward`'s way saves memory, not time: the inner gradient exists for 1,024 "
            "rows at a time, in smaller products."
        )
    return filled(text)


def of_compiled(result: dict) -> str:
    before = {row["kernel"]: row["registers"] for row in result["before"]["rows"]}
    risen = [row for row in result["rows"] if row["registers"] > before[row["kernel"]]]
    return filled(
        f"""Compiled for sm_90 (H100, H200) in bf16 without a GPU, heads of 64, rows of 768; before
        (commit {result["before"]["commit"]}) → after attention's bias was taken out of the software
        pipeline and the reduction's tiles were halved. Attention makes as many asynchronous copies
        (`cp.async`) with bias as without, and nothing is spilled to the stack, but registers of
        {len(risen)} kernels rose. Dropout draws a number for each query and each key, and mixes
        those of a pair in 5 instructions instead of 8. Blocks have 256 threads: above 128 registers
        a multiprocessor of 65,536 has room for one, before and after, whatever shared memory was
        freed. What all this gains only a GPU can say. FlexAttention, the competitor, is not here:
        PyTorch compiles it for a GPU only where it was built with CUDA. `python -m benchmarks.ops`
        times it there."""
    )
