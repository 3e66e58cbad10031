"""Speed of `metro prepare-prompts` beside the plain way, in one run on the same cores.

The plain way is `plain_prompts.py`: templates compiled per example, lines encoded one by one,
`fairseq-preprocess`. Both sides are whole commands, start-up included; they take turns, medians are
compared, and their binarised files are compared byte for byte. What the commands cost before they
have done much (starting, loading vocabularies, fairseq's dictionaries of each task) is measured
with one row of each dataset: its share is printed and has to be small, and the speedup is given
without it, too. A second table has the share of padding in batches of a training epoch, in random
order and in the order of `t5_prompt_finetuning`.

    python -m benchmarks.prompt_data [--templates DIR --data-dir DIR --vocab DIR] [DATASET ...]

Without datasets it invents two, and without a vocabulary it trains one of 4,000 pieces.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import print_table, write_results
from benchmarks.prepare_text import parse_options, run_measured, versions
from metro.data.blocks import batch_by_size
from metro.data.capped_mixture import order_by_source_and_target
from metro.data.datasets import load_rows
from scripts.demo_text import write_demo_text

METRO = [sys.executable, "-m", "metro.cli.main"]
BATCH_TOKENS = 8192
MAX_SOURCE, MAX_TARGET = 512, 256
TEMPLATES = """dataset: {name}
templates:
  a: !Template
    answer_choices: World ||| Sports ||| Business ||| Science
    jinja: "{{{{text}}}}\\n\\nIs this about {{{{answer_choices[:-1] | join(', ')}}}} or \\
      {{{{answer_choices[-1]}}}}? ||| {{{{answer_choices[label]}}}}"
    metadata: !TemplateMetadata {{metrics: [Accuracy], original_task: true}}
    name: which of these
  b: !Template
    answer_choices: World ||| Sports ||| Business ||| Science
    jinja: "{{% if label > 1 %}}Think of money. {{% endif %}}What is this text about?\\n\\
      {{{{text}}}} ||| {{{{answer_choices[label]}}}}"
    metadata: !TemplateMetadata {{metrics: [Accuracy], original_task: true}}
    name: what is it about
  c: !Template
    answer_choices: null
    jinja: "Continue: {{{{text.split(' ')[:10] | join(' ')}}}} ||| \\
      {{% for word in text.split(' ')[10:] %}}{{{{word}}}} {{% endfor %}}"
    metadata: !TemplateMetadata {{metrics: [BLEU], original_task: false}}
    name: continue
"""


def invent(work, num_rows):
    """Two datasets of English paragraphs with invented labels."""
    write_demo_text(work / "demo.txt", 3_000_000)
    lines = [x for x in (work / "demo.txt").read_text().split("\n") if x.count(" ") > 12]
    rng = random.Random(0)
    for name in ("first", "second"):
        folder = work / "templates" / name
        folder.mkdir(parents=True)
        (folder / "templates.yaml").write_text(TEMPLATES.format(name=name))
        rows = work / "data" / name / "default" / "train.jsonl"
        rows.parent.mkdir(parents=True)
        with rows.open("w") as file:
            for line in rng.sample(lines, min(num_rows, len(lines))):
                file.write(json.dumps({"text": line, "label": rng.randrange(4)}) + "\n")
    return work / "templates", work / "data", ["first", "second"]


def take_rows(names, data_dir, num_rows, folder):
    """The same rows for both sides, as local files that both read."""
    found = {}
    for name in names:
        dataset, _, subset = name.partition("/")
        rows = load_rows(dataset, subset or None, "train", data_dir=data_dir, limit=num_rows)
        path = folder / dataset / (subset or "default") / "train.jsonl"
        path.parent.mkdir(parents=True)
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        found[name] = path
    return found


def time_both(args, env, work, names, data_dir, num_rows, repeats):
    """Seconds of either side, which take turns, so that a busy machine slows both."""
    shutil.rmtree(work / "taken", ignore_errors=True)
    taken = take_rows(names, data_dir, num_rows, work / "taken")
    seconds = {"plain way": [], "metro prepare-prompts": []}
    for _ in range(repeats):
        for side in ("plain", "metro"):
            shutil.rmtree(work / side, ignore_errors=True)
        command = [*METRO, "prepare-prompts", "--mixture", work / "mix.yaml"]
        command += ["--vocab", args.vocab, "--out", work / "metro", "--templates", args.templates]
        command += ["--data-dir", work / "taken", "--workers", args.workers]
        seconds["metro prepare-prompts"].append(run_measured(command, env)[0])
        command = [sys.executable, "-m", "benchmarks.plain_prompts", "--vocab", args.vocab]
        command += ["--templates", args.templates, "--out", work / "plain"]
        command += ["--workers", args.workers]
        command += [f"{name}={path}" for name, path in taken.items()]
        seconds["plain way"].append(run_measured(command, env)[0])
    compare(work)
    return seconds


def compare(work):
    """Both sides made the same bytes of the same tasks."""
    for task in read_tasks(work):
        for name in ("src.bin", "src.idx", "tgt.bin", "tgt.idx"):
            files = [work / side / "train" / task / f"train.src-tgt.{name}"
                     for side in ("metro", "plain")]  # fmt: skip
            if files[0].read_bytes() != files[1].read_bytes():
                sys.exit(f"{task}: {name} differs between the two sides")


def read_tasks(work):
    """Name of each task -> how many examples it has."""
    manifest = json.loads((work / "metro/prompts.json").read_text())
    return {task: facts["num_examples"] for task, facts in manifest["splits"]["train"].items()}


def read_lengths(folder, side, most):
    sizes = []
    for index in sorted(folder.glob(f"train/*/train.src-tgt.{side}.idx")):
        content = index.read_bytes()
        count = int.from_bytes(content[18:26], "little")
        sizes.append(np.frombuffer(content, "<i4", count, 26))
    return np.minimum(np.concatenate(sizes), most).astype(np.int64)


def padding_shares(folder):
    """Share of padding in batches of BATCH_TOKENS, sources and targets together."""
    sources = read_lengths(folder, "src", MAX_SOURCE)
    targets = read_lengths(folder, "tgt", MAX_TARGET)
    longer = np.maximum(sources, targets + 1)
    shares = []
    for name, order in (
        ("batches in random order", np.random.RandomState(0).permutation(len(sources))),
        ("batches of t5_prompt_finetuning", order_by_source_and_target(sources, targets, 0)),
    ):
        batches = batch_by_size(order, longer[order], BATCH_TOKENS)
        padded = sum(len(b) * int(sources[b].max() + targets[b].max()) for b in batches)
        share = 1 - (sources.sum() + targets.sum()) / padded
        shares.append({"name": name, "padding_share": round(float(share), 4)})
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="*", help="as super_glue/rte")
    parser.add_argument("--templates", type=Path, help="promptsource tree")
    parser.add_argument("--data-dir", type=Path, help="local datasets")
    parser.add_argument("--vocab", type=Path, help="folder: sp.model and dict.txt")
    parser.add_argument("--rows", type=int, default=2000, help="rows of each dataset")
    args, env = parse_options(parser)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names, data_dir = args.datasets, args.data_dir
        if not names:
            args.templates, data_dir, names = invent(work, args.rows)
        if not args.vocab:
            args.vocab = work / "vocab"
            if not (work / "demo.txt").exists():
                write_demo_text(work / "demo.txt", 3_000_000)
            train = [*METRO, "prepare-text", "--train-vocab", 4000, "--out", args.vocab]
            run_measured([*train, "--input", work / "demo.txt"], env)
        (work / "mix.yaml").write_text(json.dumps({"datasets": names}))
        fixed = time_both(args, env, work, names, data_dir, 1, 1)
        seconds = time_both(args, env, work, names, data_dir, args.rows, args.repeats)
        tasks, shares = read_tasks(work), padding_shares(work / "metro")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    moving = {name: median[name] - fixed[name][0] for name in median}
    can_compare = min(moving.values()) > 0  # with a handful of rows noise decides
    rows = [
        {
            "name": name,
            "tasks": len(tasks),
            "examples": sum(tasks.values()),
            "workers": args.workers,
            "seconds": round(median[name], 2),
            "seconds_all": [round(value, 2) for value in seconds[name]],
            "fixed_seconds": round(fixed[name][0], 2),
            "fixed_share": round(fixed[name][0] / median[name], 3),
            "examples_per_second": round(sum(tasks.values()) / median[name]),
            "speedup": round(median["plain way"] / median[name], 2),
            "speedup_without_fixed": round(moving["plain way"] / moving[name], 2)
            if can_compare
            else None,
        }
        for name in median
    ]
    columns = ("name", "examples", "seconds", "fixed_seconds", "fixed_share", "speedup")
    columns += ("speedup_without_fixed",)
    print_table([{column: row[column] for column in columns} for row in rows])
    if rows[0]["fixed_share"] > 0.1:
        print("more than a tenth of the plain way's time is fixed cost: raise --rows to compare")
    print_table(shares)
    datasets = args.datasets or "invented"
    write_results("prompt_data", rows + shares, datasets=datasets, **versions())


if __name__ == "__main__":
    main()
