"""Peak memory of commands on large inputs and on a tenth of them.

python -m tests.faults.memory [--scale 1] [--only NAME] [--page docs/reliability.md]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.data.prepared import random_text
from tests.data.prompts.toys import make_world
from tests.evaluation.run_folders import write_run
from tests.faults.kills import put_into
from tests.finetuning.prepared import write_t5


def measure(words: list[str], folder: Path) -> tuple[float, float]:
    """Run `metro`; peak memory of its largest process in MB, and seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "metro.cli.main", *words],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return usage.ru_maxrss / 1024, time.monotonic() - began


def text(folder: Path, megabytes: int) -> list[str]:
    block = random_text(0, 20_000)
    path = folder / f"{megabytes}.txt"
    with path.open("w", encoding="utf-8") as file:
        for number in range(-(-megabytes * 1_000_000 // len(block.encode()))):
            file.write(f"{block}\nblock {number}\n\n")
    words = f"prepare-text --input {path} --vocab vocab --out {megabytes}.out --workers 1"
    return words.split()


def prompts(folder: Path, rows: int) -> list[str]:
    world = make_world(folder / f"world{rows}", num_rows=rows // 2)
    (world / "mix.yaml").write_text("datasets: [one, two/sub]\n")
    words = f"prepare-prompts --mixture {world}/mix.yaml --templates {world}/templates"
    return f"{words} --data-dir {world}/data --out prompts{rows} --workers 1".split()


def write_rows(folder: Path, rows: int) -> None:
    draw = random.Random(0)
    with (folder / f"{rows}.jsonl").open("w") as file:
        for number in range(rows):
            row = {"text": f"it was {draw.choice(['good', 'bad'])}", "label": number % 2}
            file.write(json.dumps(row) + "\n")


def ranking(folder: Path, rows: int) -> list[str]:
    write_rows(folder, rows)
    words = f"rank t5 --input {rows}.jsonl --text text --options good bad --device cpu"
    return [*words.split(), "--out", f"ranked{rows}.csv"]


def evaluation(folder: Path, rows: int) -> list[str]:
    write_rows(folder, rows)
    prompt = {"jinja": "{{text}} ||| {{answer_choices[label]}}", "answer_choices": "Bad ||| Good"}
    suite = {"tasks": {"one": {"data": f"{rows}.jsonl", "prompts": {"ask": prompt}}}}
    (folder / f"suite{rows}.yaml").write_text(json.dumps(suite))
    return f"evaluate t5 --suite suite{rows}.yaml --out results --device cpu".split()


def report(folder: Path, runs: int) -> list[str]:
    draw = random.Random(0)
    for number in range(runs):
        accuracies = {
            task: {f"p{i}": [draw.random() < 0.6 for _ in range(1000)] for i in range(10)}
            for task in ("rte", "cb", "copa")
        }
        write_run(folder / f"runs{runs}/{number}", accuracies, model=f"some/model{number}")
    return ["report", f"runs{runs}", "--out", f"report{runs}"]


CASES = [
    ("`prepare-text`, MB of text", text, 1000),
    ("`prepare-prompts`, rows (3 templates each)", prompts, 100_000),
    ("`evaluate`, rows of a prompt", evaluation, 100_000),
    ("`rank`, rows", ranking, 100_000),
    ("`report`, runs (30 prompts of 1,000 rows each)", report, 40),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the inputs")
    parser.add_argument("--only", default="", help="commands with this in their name")
    parser.add_argument("--page", type=Path, help="page that gets the table")
    options = parser.parse_args()
    lines = ["| command and input | a tenth | all | seconds for all |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(random_text(0, 3000))
        words = "prepare-text --input text.txt --train-vocab 150 --out vocab --workers 1"
        measure(words.split(), folder)
        write_t5(folder / "t5")
        for title, make, size in reversed([case for case in CASES if options.only in case[0]]):
            size = int(size * options.scale)
            small, _ = measure(make(folder, size // 10), folder)
            large, seconds = measure(make(folder, size), folder)
            line = f"| {title}: {size:,} | {small:.0f} MB | {large:.0f} MB | {seconds:.0f} |"
            print(line, flush=True)
            lines.insert(2, line)
    if options.page:
        put_into(options.page, "memory", "\n".join(lines))


if __name__ == "__main__":
    main()
