"""Speed and memory of `metro prepare-text` beside the plain chain, in one run on the same cores.

The plain chain: a Python normaliser and SentencePiece line by line (`plain_chain.py`), a text file
of pieces, `fairseq-preprocess`. Both sides are whole commands, start-up included, and their results
are compared byte for byte. Both run several times in turns, and medians are compared. Memory is the
peak, summed over all processes, for the text once and ten times.

    python -m benchmarks.prepare_text [--vocab DIR] [FILE...]

Without files it reads the documentation in the installed packages, and without a vocabulary it
trains one of 8,000 pieces on the text.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.common import ROOT, print_table, write_results
from metro.utils.worker_pool import available_cores
from scripts.demo_text import write_demo_text

METRO = [sys.executable, "-m", "metro.cli.main", "prepare-text", "--valid-fraction", "0"]


def run_measured(command, env=None):
    """Wall seconds, and the peak in MiB of the memory that all its processes hold together."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    os.set_blocking(process.stderr.fileno(), False)
    errors = b""
    while process.poll() is None:
        peak = max(peak, memory_of_tree(process.pid))
        errors = (errors + (process.stderr.read() or b""))[-4000:]
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        errors += process.stderr.read() or b""
        sys.exit(f"failed: {' '.join(map(str, command))}\n{errors.decode(errors='replace')}")
    return seconds, peak


def parse_options(parser):
    """Arguments with those of all benchmarks of whole commands; environment of the commands."""
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--repeats", type=int, default=3, help="runs of either side")
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    args = parser.parse_args()
    if args.out:
        os.environ["OUT"] = str(args.out)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return args, {**os.environ, "PYTHONPATH": path}


def memory_of_tree(pid):
    """Proportional set size (shared pages counted once) of a process and its children, in MiB."""
    total, pids = 0, [pid]
    while pids:
        pid = pids.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(next(x for x in rollup.splitlines() if x.startswith("Pss:")).split()[1])
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += map(int, children.read_text().split())
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
    return total / 1024


def versions():
    """Return the versions that the environment's own record lacks."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "numpy": version("numpy"),
        "sentencepiece": version("sentencepiece"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=Path, help="text files")
    parser.add_argument("--vocab", type=Path, help="folder: sp.model and dict.txt")
    args, env = parse_options(parser)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not args.inputs:
            args.inputs = [work / "english.txt"]
            write_demo_text(args.inputs[0], 16_000_000)
        if not args.vocab:
            args.vocab = work / "vocab"
            train = [*METRO, "--out", args.vocab, "--train-vocab", 8000, "--input", *args.inputs]
            run_measured(train, env)
        plain_seconds, metro_seconds = [], []
        for _ in range(args.repeats):  # taking turns, so that a busy machine slows both
            metro = [*METRO, "--out", work / "metro", "--vocab", args.vocab]
            metro += ["--workers", args.workers, "--overwrite", "--input", *args.inputs]
            shutil.rmtree(work / "metro", ignore_errors=True)
            metro_seconds.append(run_measured(metro, env)[0])
            shutil.rmtree(work / "plain", ignore_errors=True)
            encode = [sys.executable, ROOT / "benchmarks/plain_chain.py", "--lower"]
            encode += ["--model", args.vocab / "sp.model", "--out", work / "pieces"]
            encode += ["--workers", args.workers, *args.inputs]
            binarise = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source"]
            binarise += ["--srcdict", args.vocab / "dict.txt", "--trainpref", work / "pieces"]
            binarise += ["--destdir", work / "plain", "--workers", args.workers]
            plain_seconds.append(
                sum(run_measured(command, env)[0] for command in (encode, binarise))
            )
            for suffix in ("bin", "idx"):
                ours, theirs = work / f"metro/train.{suffix}", work / f"plain/train.{suffix}"
                if ours.read_bytes() != theirs.read_bytes():
                    sys.exit(f"train.{suffix} differs between the two sides")
        megabytes = sum(path.stat().st_size for path in args.inputs) / 1e6
        for name, seconds in (
            ("plain chain", plain_seconds),
            ("metro prepare-text", metro_seconds),
        ):
            rows.append(
                {
                    "name": name,
                    "workers": args.workers,
                    "input_mb": round(megabytes, 1),
                    "seconds": round(statistics.median(seconds), 2),
                    "seconds_all": [round(value, 2) for value in seconds],
                    "mb_per_second": round(megabytes / statistics.median(seconds), 2),
                    "speedup": round(
                        statistics.median(plain_seconds) / statistics.median(seconds), 2
                    ),
                }
            )
        for times in (1, 10):
            text = work / "text.txt"
            with text.open("wb") as joined:
                for path in args.inputs * times:
                    joined.write(path.read_bytes() + b"\n")
            shutil.rmtree(work / "metro", ignore_errors=True)
            command = [*METRO, "--out", work / "metro", "--vocab", args.vocab]
            seconds, peak = run_measured(
                [*command, "--workers", args.workers, "--input", text], env
            )
            rows.append(
                {
                    "name": f"metro prepare-text, {times}x input",
                    "workers": args.workers,
                    "input_mb": round(text.stat().st_size / 1e6, 1),
                    "seconds": round(seconds, 2),
                    "mb_per_second": round(text.stat().st_size / 1e6 / seconds, 2),
                    "peak_memory_mib": round(peak, 1),
                }
            )
    columns = ("name", "input_mb", "seconds", "mb_per_second", "speedup", "peak_memory_mib")
    print_table([{column: row.get(column, "") for column in columns} for row in rows])
    write_results("prepare_text", rows, **versions())


if __name__ == "__main__":
    main()
