"""Processor seconds that the commands of `metro` take on next to no work.

Help, the doctor and other commands without a model, which prepare little text and few prompts, and
runs of a tiny METRO model with random weights, which this benchmark makes: 40 texts evaluated,
ranked and answered, one update of finetuning and of pretraining. `metro templates`, which waits for
a download, is left out. Each command runs in a process of its own with one thread; seconds are
those of the process and its children, in user and system mode, which a busy machine changes little;
the median counts. Beside them what Python, PyTorch and T5 of transformers take to be imported, as a
script with that model does.

    python -m benchmarks.startup
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, print_table, write_results

NUM_TEXTS = 40
MODEL = "from transformers import T5ForConditionalGeneration"
IMPORTS = ("import sys", "import torch", MODEL)
METRO = ("-m", "metro.cli.main")
TEMPLATE = """
dataset: toy
templates:
  1: !Template
    name: good
    jinja: "{{text}} Is it good? ||| {{answer_choices[label]}}"
    answer_choices: no ||| yes
    metadata: !TemplateMetadata
      metrics: [Accuracy]
      original_task: true
"""


def write_inputs(folder: Path) -> None:
    """Invented text to pretrain on, rows and lines for the other commands."""
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=5)) for _ in range(200)]

    def line() -> str:
        return " ".join(generator.choices(words, k=12))

    (folder / "text.txt").write_text("\n\n".join(line() for _ in range(500)))
    texts = [line() for _ in range(NUM_TEXTS)]
    (folder / "lines.txt").write_text("\n".join(texts))
    rows = (f"{text},{'good' if i % 2 else 'bad'}" for i, text in enumerate(texts))
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    write_dataset(folder, texts)


def write_dataset(folder: Path, texts: list[str]) -> None:
    """A dataset with its template, and a mixture of it alone."""
    (folder / "toy").mkdir()
    rows = (json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts))
    (folder / "toy/train.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "toy/templates.yaml").write_text(TEMPLATE)
    (folder / "toy.yaml").write_text("datasets: [toy]\n")


def commands(folder: Path, number: int) -> dict[str, list[str]]:
    """Name as shown, and arguments of `metro` in the run of this number."""
    model, rows, lines = (str(folder / name) for name in ("model", "rows.csv", "lines.txt"))
    ask = ["--template", "{{text}} Is it good or bad? ||| {{label}}"]
    out = str(folder / f"out_{number}")
    return {
        "metro --help": ["--help"],
        "metro pretrain --help": ["pretrain", "--help"],
        "metro plugins": ["plugins"],
        "metro models": ["models"],
        "metro plan": ["plan", "--pretrain", "metro_t5_tiny"],
        "metro doctor": ["doctor"],
        "metro prepare-text, 500 lines": [
            *("prepare-text", "--input", str(folder / "text.txt"), "--out", out + "_data"),
            *("--vocab", str(folder / "data"), "--workers", "1"),
        ],
        "metro prompts list": ["prompts", "list", "--templates", str(folder)],
        "metro prepare-prompts, 40 rows": [
            *("prepare-prompts", "--mixture", str(folder / "toy.yaml"), "--out", out + "_prompts"),
            *("--data-dir", str(folder), "--templates", str(folder), "--validation", "none"),
        ],
        "metro convert": ["convert", "to-fairseq", model, "--out", out + ".pt"],
        "metro report": ["report", str(folder / "run"), "--out", out + "_report"],
        "metro flip, 1 text": [
            *("flip", model, "--input", "<extra_id_0> good <extra_id_1>"),
            *("--options", "good", "--options", "bad", "--max-new-tokens", "4"),
        ],
        "metro rank, 40 texts": ["rank", model, "--input", lines, "--options", "good", "bad"],
        "metro evaluate, 40 rows": [
            *("evaluate", model, "--data", rows, *ask, "--options", "good", "bad"),
            *("--out", out),
        ],
        "metro generate, 40 texts": [
            *("generate", model, "--input", lines, "--max-new-tokens", "4"),
            *("--output", out + ".txt"),
        ],
        "metro finetune, 1 update": [
            *("finetune", "--model", model, "--data", rows, *ask, "--valid-fraction", "0"),
            *("--max-steps", "1", "--output-dir", out + "_finetune", "--report-to", "none"),
        ],
        "metro pretrain, 1 update": pretrain(folder, out + "_pretrain"),
    }


def pretrain(folder: Path, out: str) -> list[str]:
    return [
        *("pretrain", "--config", "metro_t5_tiny", "--data", str(folder / "data")),
        *("--output-dir", out, "--max-update", "1", "--cpu", "--report-to", "none"),
    ]


def seconds_of(arguments: list[str]) -> float:
    """Processor seconds of a Python process that succeeds, and of its children."""
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{arguments}: {log.read().decode()[-2000:]}")
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        data = ["--input", str(folder / "text.txt"), "--out", str(folder / "data")]
        seconds_of([*METRO, "prepare-text", *data, "--train-vocab", "150", "--workers", "1"])
        seconds_of([*METRO, *pretrain(folder, str(folder / "model"))])
        evaluate = commands(folder, number=0)["metro evaluate, 40 rows"]
        seconds_of([*METRO, *evaluate[:-1], str(folder / "run")])
        seconds: dict[str, list[float]] = {}
        for number in range(args.repeats):
            runs = {line: ["-c", line] for line in IMPORTS}
            of_metro = commands(folder, number)
            runs |= {name: [*METRO, *given] for name, given in of_metro.items()}
            for name, given in runs.items():
                seconds.setdefault(name, []).append(seconds_of(given))
    rows: list[dict] = [
        {"command": name, "CPU seconds": statistics.median(found), "all": found}
        for name, found in seconds.items()
    ]
    medians = [{"command": row["command"], "CPU seconds": row["CPU seconds"]} for row in rows]
    print_table(medians, f"median of {args.repeats}")
    write_results("startup", rows, repeats=args.repeats, threads=1)


if __name__ == "__main__":
    main()
