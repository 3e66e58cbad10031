"""Speed of rank classification beside the published way, in one run on the same cores.

The published way (METRO-T0's and T0's scripts): examples in random order, 8 at a time, the input
encoded anew for every choice, everything padded to the longest of the batch, attention with all its
weights written out, log-probabilities of the whole vocabulary at every position. Ours:
`metro.evaluation`. Both use the same weights in the same process, take turns prompt by prompt, a
prompt ``--rounds`` times of which the median counts, and begin with the same rendered texts;
predictions have to be equal. Left out although it favours us: the published scripts load the model
anew for every prompt.

    python -m benchmarks.evaluation [--device cuda] [--data-dir DIR] [--templates DIR] [--rows N]

By default the T0 sets of the folder of recorded data, 48 rows and 1 prompt of each, and a METRO
model of the base's size with random weights; smaller ones spend more of their time outside of
products, and their results have names of their own. Seconds are processor time of the process,
which other processes on the machine disturb least. On a GPU both ways compute in bf16, ours with
``fuse``, seconds are of the clock on the wall, and predictions that differ are counted. On the CPU
ours computes once more as by ``--precision bf16``, and its predictions and scores are compared with
float32's. The last row weighs each set by its rows and prompts: the time of the whole suite.

``times_floor`` is our time over that of the products which no way can do without: the encoder over
each distinct input once, the decoder and the vocabulary over each distinct beginning of an option,
keys and values of an input unless its options are few enough to read it without, at the speed of
one large product measured in the same run, in float32; ``bf16_times_floor`` is the same of bf16.
``speedup_at_floor`` is therefore the most that sharing can give: little where an input is short and
has two options, as the published way computes it twice and we compute it once.
"""

import argparse
import copy
import random
import re
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.nn import Linear

from benchmarks.common import data_folder, print_table, write_results
from benchmarks.page import TARGETS
from benchmarks.timing import seconds_now, subject_on
from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.scoring.pair_scoring import Pair, PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier
from metro.evaluation.tasks.loading import Sources, load_tasks
from metro.evaluation.tasks.suites import find_suite
from metro.fusion import fuse
from metro.models.registry import METHODS
from metro.ops.linear import linear

SHARED = data_folder()
BATCH = 8
BASE = 12, 768
"""Layers of each stack, and their width."""
GPU_TARGET = 4.0
"""Times the published way's speed over the whole suite. There both ways compute in bf16, each with
roundings of its own: predictions that differ are counted."""


def subject_of(layers: int, width: int) -> str:
    """Name results by the model's size, so that another size leaves those of the base alone."""
    return "evaluation" if (layers, width) == BASE else f"evaluation_{layers}_{width}"


def make_model(vocabulary: Path, layers: int, width: int, device: str):
    """A METRO model with random weights, the same as published, its tokenizer."""
    from metro.modeling.configuration_metro_t5 import MetroT5Config
    from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
    from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer

    tokenizer = MetroT5Tokenizer(vocabulary / "sp.model", vocabulary / "dict.txt")
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=tokenizer.vocab_size,
        num_layers=layers,
        d_model=width,
        d_ff=4 * width,
        num_heads=width // 64,
        initializer_factor=3,
    )
    model = MetroT5ForConditionalGeneration(MetroT5Config(**sizes)).eval()
    plain = MetroT5ForConditionalGeneration._from_config(
        MetroT5Config(**sizes), attn_implementation="eager"
    ).eval()
    plain.load_state_dict(model.state_dict())
    if device == "cuda":
        model, plain = (x.to(device, torch.bfloat16) for x in (fuse(model), plain))
    return model, plain, tokenizer


def pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def pairs_of(classifier: RankClassifier, examples) -> list[Pair]:
    """A pair per answer choice of each example."""
    texts = classifier.sources(examples), classifier.targets(examples)
    return [Pair(source, target) for source, target in zip(*texts, strict=True)]


@torch.inference_mode()
def published_way(model, encoder, examples, method):
    """Scores of all examples, computed as the published scripts do."""
    classifier = RankClassifier(PairScorer(model), encoder, method)
    pairs, counts = pairs_of(classifier, examples), [len(e.choices) for e in examples]
    start, filler = model.config.decoder_start_token_id, model.config.pad_token_id
    scores, end = [], 0
    for first in range(0, len(examples), BATCH):
        size = sum(counts[first : first + BATCH])
        batch, end = pairs[end : end + size], end + size
        sources = pad([pair.source for pair in batch], filler).to(model.device)
        targets = pad([pair.target for pair in batch], filler).to(model.device)
        starts = torch.full_like(targets[:, :1], start)
        logits = model(
            input_ids=sources,
            attention_mask=sources.ne(filler).long(),
            decoder_input_ids=torch.cat([starts, targets[:, :-1]], 1),
            use_cache=False,
        ).logits
        log_p = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        scores += log_p.masked_fill(targets == filler, 0.0).sum(1).tolist()
    return split(scores, counts)


def our_way(model, encoder, examples, method):
    """Scores of all examples by `metro.evaluation`."""
    rankings = RankClassifier(PairScorer(model), encoder, method).rank(examples)
    return [ranking.scores for ranking in rankings]


def split(values, counts):
    found, end = [], 0
    for count in counts:
        found.append(values[end : end + count])
        end += count
    return found


def product_flops(model, pairs) -> int:
    """Operations of the products with the model's weights, each needed one done once.

    Decoder tokens read a source by keys and values, or by its hidden states themselves (see
    :class:`metro.evaluation.scoring.packed_attention.Unprojected`), whichever takes less; the
    latter's scores are counted, as they are what replaces the products.
    """
    size = {name: x.weight.numel() for name, x in model.named_modules() if isinstance(x, Linear)}
    keys = {name: n for name, n in size.items() if re.match(r".*EncDecAttention\.[kv]$", name)}
    per_key = sum(keys.values())
    per_source = sum(n for name, n in size.items() if name.startswith("encoder."))
    per_target = sum(size.values()) - per_source - per_key
    scores = len(keys) * model.config.num_heads * model.config.d_model
    beginnings = {(source, target[:end]) for source, target in pairs for end in range(len(target))}
    count = 0
    for source, num_targets in Counter(source for source, _ in beginnings).items():
        unprojected = num_targets * (per_key + len(source) * scores)
        count += len(source) * per_source + num_targets * per_target
        count += min(len(source) * per_key, unprojected)
    return 2 * count


@torch.inference_mode()
def product_speed(width: int, device: str, dtype: torch.dtype, rows: int = 1024) -> float:
    """Floating-point operations a second of the best product of a layer's size."""
    rows = 16 * rows if device == "cuda" else rows
    x, weight = (torch.randn(n, width).to(device, dtype) for n in (rows, 4 * width))
    best = float("inf")
    for _ in range(100):  # a shared machine may be slow for a while
        started = seconds_now(device)
        linear(x, weight)
        best = min(best, seconds_now(device) - started)
    return 2 * x.numel() * len(weight) / best


def compare_on_task(model, plain, tokenizer, task, prompts, method, rounds, speeds):
    """Seconds of both ways on some prompts of a task; on the CPU predictions have to agree.

    ``rounds``: times that each way computes a prompt. ``speeds``: FLOP/s of a product in the
    model's type, and in bf16.
    """
    device, num_different = model.device.type, 0
    lengths = {"max_target_length": 512} if method == "channel" else {}
    encoder = PromptEncoder(tokenizer, **lengths)
    ways = {"published": (published_way, plain), "ours": (our_way, model)}
    if device == "cpu":
        ways["bf16"] = (our_way, copy.deepcopy(model).bfloat16())
    seconds, count, farthest, farthest_rounded = dict.fromkeys(ways, 0.0), 0, 0.0, 0.0
    flops = num_flips = 0
    for prompt in prompts:
        examples = task.examples(prompt, flipped=method == "flipped").examples
        random.Random(0).shuffle(examples)
        scores, taken = {}, {name: [] for name in ways}
        for name, (way, network) in [*ways.items()] * rounds:
            started = seconds_now(device)
            scores[name] = way(network, encoder, examples, method)
            taken[name].append(seconds_now(device) - started)
        seconds = {name: seconds[name] + statistics.median(taken[name]) for name in ways}
        count += len(examples)
        pairs = pairs_of(RankClassifier(PairScorer(model), encoder, method), examples)
        flops += product_flops(model, pairs)
        for rounded, ours in zip(scores.get("bf16", []), scores["ours"], strict=device == "cpu"):
            num_flips += rounded.index(max(rounded)) != ours.index(max(ours))
            apart = (abs(a - b) for a, b in zip(rounded, ours, strict=True))
            farthest_rounded = max(farthest_rounded, *apart)
        for theirs, ours in zip(scores["published"], scores["ours"], strict=True):
            if theirs.index(max(theirs)) != ours.index(max(ours)):
                num_different += 1
                if device == "cpu":
                    raise SystemExit(f"{task.name} / {prompt}: predictions differ: {theirs} {ours}")
            farthest = max(farthest, *(abs(a - b) for a, b in zip(theirs, ours, strict=True)))
    floors = [flops / speed for speed in speeds]
    row = as_row(method, task.name, count, num_different, farthest, seconds, floors)
    if device == "cpu":
        row |= {"bf16_different": num_flips, "bf16_largest_difference": farthest_rounded}
    return row


def as_row(method, task, examples, num_different, farthest, seconds, floors) -> dict:
    """Speeds of one task; ``seconds`` by way, ``floors`` in the model's type and in bf16."""
    floor_s, bf16_floor_s = floors
    published_s, ours_s, bf16_s = (seconds.get(way) for way in ("published", "ours", "bf16"))
    row = {
        "method": method, "task": task, "examples": examples,
        "published_per_s": examples / published_s, "ours_per_s": examples / ours_s,
        "speedup": published_s / ours_s, "speedup_at_floor": published_s / floor_s,
        "times_floor": ours_s / floor_s, "largest_difference": farthest,
        "different_predictions": num_different,
        "published_s": published_s, "ours_s": ours_s, "floor_s": floor_s,
    }  # fmt: skip
    if bf16_s is None:
        return row
    return row | {
        "bf16_s": bf16_s, "bf16_floor_s": bf16_floor_s, "bf16_speedup": published_s / bf16_s,
        "bf16_times_floor": bf16_s / bf16_floor_s,
    }  # fmt: skip


def whole_sizes(tasks):
    """Examples of each task in a run over everything: its rows times its prompts."""
    return {task.name: len(task.data) * len(task.prompts) for task in tasks}


def summed(rows, name, sizes=None):
    """One row for all tasks, each counted as if it had had as many examples as ``sizes`` says."""
    keys = ("published_s", "ours_s", "bf16_s", "floor_s", "bf16_floor_s")
    keys = [key for key in keys if key in rows[0]]
    examples, seconds = 0, dict.fromkeys(keys, 0.0)
    for row in rows:
        factor = 1.0 if sizes is None else sizes[row["task"]] / row["examples"]
        examples += round(row["examples"] * factor)
        seconds = {key: total + row[key] * factor for key, total in seconds.items()}
    farthest = max(row["largest_difference"] for row in rows)
    num_different = sum(row["different_predictions"] for row in rows)
    floors = seconds.pop("floor_s"), seconds.pop("bf16_floor_s", None)
    of_way = {key.removesuffix("_s"): value for key, value in seconds.items()}
    row = as_row(rows[0]["method"], name, examples, num_different, farthest, of_way, floors)
    if "bf16_different" in rows[0]:
        row["bf16_different"] = sum(each["bf16_different"] for each in rows)
        row["bf16_largest_difference"] = max(each["bf16_largest_difference"] for each in rows)
    return row


def judge(row: dict, target: float, equal: bool = True) -> str:
    """Say whether the target is met; ``equal``: if no prediction differs."""
    num_different = row["different_predictions"]
    met = row["speedup"] >= target and not (equal and num_different)
    return (
        f"{row['method']}, {row['task']}: {row['speedup']:.3g} x the published way, "
        f"{num_different} of {row['measured']:,} measured predictions differ; target "
        f"{target:g} x{' with equal predictions' * equal}: {'met' if met else 'NOT met'}"
    )


def targets_of(rows: list[dict], sizes: dict[str, int], on_gpu: bool) -> list[str]:
    """Judge each method over the whole suite, or over what is measured of it so far."""
    target = GPU_TARGET if on_gpu else TARGETS["evaluation on T0's sets, direct"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method and row["task"] in sizes]
        part = "" if len(mine) == len(sizes) else f", {len(mine)} of {len(sizes)} sets"
        whole = summed(mine, f"whole suite{part}", sizes)
        whole["measured"] = sum(row["examples"] for row in mine)
        lines.append(judge(whole, target, equal=not on_gpu))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--data-dir", type=Path, default=SHARED / "data")
    parser.add_argument("--templates", type=Path, default=SHARED / "prompts")
    parser.add_argument("--vocab", type=Path, default=SHARED / "vocab" / "vocab_32k")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=BASE[0], help="of each stack")
    parser.add_argument("--width", type=int, default=BASE[1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["direct"])
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if not options.data_dir.is_dir():
        print(f"no data in {options.data_dir}: give --data-dir, --templates and --vocab")
        return
    shape = options.layers, options.width
    model, plain, tokenizer = make_model(options.vocab, *shape, options.device)
    sources = Sources(options.data_dir, options.templates, limit=options.rows)
    tasks, _ = load_tasks(find_suite("t0"), sources)
    sizes = whole_sizes(tasks)
    types = torch.bfloat16 if on_gpu else torch.float32, torch.bfloat16
    rows, speeds = [], [product_speed(options.width, options.device, each) for each in types]
    store = partial(
        write_results,
        subject_on(options.device, subject_of(*shape)),
        layers=options.layers, width=options.width, rows_per_task=options.rows,
        prompts_per_task=options.prompts, rounds=options.rounds, threads=torch.get_num_threads(),
        gflops_per_second=speeds[0] / 1e9, bf16_gflops_per_second=speeds[1] / 1e9,
    )  # fmt: skip
    for method in options.methods:
        compare = partial(compare_on_task, model, plain, tokenizer, method=method, speeds=speeds)
        # Warm up, and fill the tokenizer's memory of words.
        compare(tasks[0], tasks[0].prompts[:1], rounds=1)
        mine = []
        for task in tasks:
            mine.append(compare(task, task.prompts[: options.prompts], rounds=options.rounds))
            found = rows + mine  # in case that the rest runs out of time
            store(found, targets=targets_of(found, sizes, on_gpu))
        rows += [*mine, summed(mine, "all"), summed(mine, "whole suite", sizes)]
    hidden = {"published_s", "ours_s", "floor_s", "bf16_s", "bf16_floor_s", "different_predictions"}
    shown = [{key: x for key, x in row.items() if key not in hidden} for row in rows]
    print_table(shown, f"rank classification on {options.device}")
    targets = targets_of(rows, sizes, on_gpu)
    print("\n".join(targets))
    store(rows, targets=targets)


if __name__ == "__main__":
    main()
