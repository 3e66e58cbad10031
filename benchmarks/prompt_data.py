"""Speed of `metro prepare-prompts` beside the plain way, in one run on the same cores.

The plain way is `plain_prompts.py`: templates compiled per example, lines encoded one by one,
`fairseq-preprocess`. Both sides are whole commands, start-up included; they take turns, medians are
compared, and their binarised files are compared byte for byte. A second table has the share of
padding in batches of a training epoch: of examples as they come, and grouped by length as both
training routes do it.

    python -m benchmarks.prompt_data [--templates DIR --data-dir DIR --vocab DIR] [DATASET ...]

Without data sets it invents two, and without a vocabulary it trains one of 4,000 pieces.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, print_table, write_results
from benchmarks.prepare_text import run_measured, versions
from metro.data.datasets import load_rows
from metro.data.demo_text import write_demo_text
from metro.environment import available_cores

METRO = [sys.executable, "-m", "metro.cli.main"]
BATCH_TOKENS = 8192
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
    """Two data sets of English paragraphs with invented labels."""
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


def take_rows(names, data_dir, num_rows, work):
    """The same rows for both sides, as local files that both read."""
    found = {}
    for name in names:
        dataset, _, subset = name.partition("/")
        rows = load_rows(dataset, subset or None, "train", data_dir=data_dir, limit=num_rows)
        path = work / "taken" / dataset / (subset or "default") / "train.jsonl"
        path.parent.mkdir(parents=True)
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        found[name] = path
    return found


def padding_share(lengths, grouped):
    """Share of padding in batches of BATCH_TOKENS positions, padding included."""
    order = np.random.default_rng(0).permutation(len(lengths))
    if grouped:
        order = order[np.argsort(lengths[order], kind="stable")]
    padded, batch = 0, []
    for length in lengths[order]:
        if batch and max(max(batch), length) * (len(batch) + 1) > BATCH_TOKENS:
            padded += max(batch) * len(batch)
            batch = []
        batch.append(int(length))
    padded += max(batch) * len(batch)
    return 1 - lengths.sum() / padded


def source_lengths(folder):
    sizes = []
    for index in sorted(folder.glob("train/*/train.src-tgt.src.idx")):
        content = index.read_bytes()
        count = int.from_bytes(content[18:26], "little")
        sizes.append(np.frombuffer(content, "<i4", count, 26))
    return np.minimum(np.concatenate(sizes), 512).astype(np.int64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_sets", nargs="*", help="as super_glue/rte")
    parser.add_argument("--templates", type=Path, help="promptsource tree")
    parser.add_argument("--data-dir", type=Path, help="local data sets")
    parser.add_argument("--vocab", type=Path, help="folder: sp.model and dict.txt")
    parser.add_argument("--rows", type=int, default=1500, help="rows of each data set")
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--repeats", type=int, default=3, help="runs of either side")
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    args = parser.parse_args()
    if args.out:
        os.environ["OUT"] = str(args.out)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names, templates, data_dir = args.data_sets, args.templates, args.data_dir
        if not names:
            templates, data_dir, names = invent(work, args.rows)
        taken = take_rows(names, data_dir, args.rows, work)
        if not args.vocab:
            args.vocab = work / "vocab"
            if not (work / "demo.txt").exists():
                write_demo_text(work / "demo.txt", 3_000_000)
            train = [*METRO, "prepare-text", "--train-vocab", 4000, "--out", args.vocab]
            run_measured([*train, "--input", work / "demo.txt"], env)
        (work / "mix.yaml").write_text(json.dumps({"data_sets": names}))
        plain_seconds, metro_seconds = [], []
        for _ in range(args.repeats):  # taking turns, so that a busy machine slows both
            shutil.rmtree(work / "metro", ignore_errors=True)
            command = [*METRO, "prepare-prompts", "--mixture", work / "mix.yaml", "--vocab"]
            command += [args.vocab, "--out", work / "metro", "--templates", templates]
            command += ["--data-dir", work / "taken", "--workers", args.workers]
            metro_seconds.append(run_measured(command, env)[0])
            shutil.rmtree(work / "plain", ignore_errors=True)
            command = [sys.executable, "-m", "benchmarks.plain_prompts", "--templates", templates]
            command += ["--vocab", args.vocab, "--out", work / "plain", "--workers", args.workers]
            command += [f"{name}={path}" for name, path in taken.items()]
            plain_seconds.append(run_measured(command, env)[0])
        manifest = json.loads((work / "metro/prompts.json").read_text())
        compare(work, manifest)
        examples = sum(f["num_examples"] for f in manifest["splits"]["train"].values())
        rows = [
            {
                "name": name,
                "tasks": len(manifest["splits"]["train"]),
                "examples": examples,
                "workers": args.workers,
                "seconds": round(statistics.median(seconds), 2),
                "seconds_all": [round(value, 2) for value in seconds],
                "examples_per_second": round(examples / statistics.median(seconds)),
                "speedup": round(statistics.median(plain_seconds) / statistics.median(seconds), 2),
            }
            for name, seconds in (
                ("plain way", plain_seconds),
                ("metro prepare-prompts", metro_seconds),
            )
        ]
        lengths = source_lengths(work / "metro")
        shares = [
            {"name": name, "padding_share": round(float(padding_share(lengths, grouped)), 4)}
            for name, grouped in (("batches as they come", False), ("grouped by length", True))
        ]
    print_table(
        [{key: value for key, value in row.items() if key != "seconds_all"} for row in rows]
    )
    print_table(shares)
    data_sets = args.data_sets or "invented"
    write_results("prompt_data", rows + shares, data_sets=data_sets, **versions())


def compare(work, manifest):
    """Both sides made the same bytes of the same tasks."""
    for task in manifest["splits"]["train"]:
        for name in ("src.bin", "src.idx", "tgt.bin", "tgt.idx"):
            files = [work / side / "train" / task / f"train.src-tgt.{name}"
                     for side in ("metro", "plain")]  # fmt: skip
            if files[0].read_bytes() != files[1].read_bytes():
                sys.exit(f"{task}: {name} differs between the two sides")


if __name__ == "__main__":
    main()
