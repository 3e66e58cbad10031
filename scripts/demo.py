"""Pretrain a small METRO model on this machine: `make demo`.

Text (the documentation in the installed Python packages, or --text FILE...) -> `metro prepare-text`
-> `metro pretrain` -> curves -> what the model has learnt, shown and measured on held-out text.
Every step prints its command, as one would type it. Stopped at any moment and started again, it
resumes; all files are in one folder, demo/.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from demo_probe import Probe, bigram_bits
from demo_text import write_demo_text
from plot_training import LOSSES, draw, read_log
from rich.console import Console

from metro.utils.messages import UserError
from metro.utils.worker_pool import available_cores

ROOT = Path(__file__).resolve().parent.parent
TEXT_BYTES = 5_000_000
VOCAB_SIZE = 2000
NUM_UPDATES = 2000
BATCH_TOKENS = 1024  # of metro_t5_tiny

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", help="plain text, an empty line between documents")
    parser.add_argument("--updates", type=int, default=NUM_UPDATES, help=f"default {NUM_UPDATES}")
    parser.add_argument("--folder", type=Path, default="demo", help="where all goes; default demo")
    args = parser.parse_args()
    texts = [str(Path(text).resolve()) for text in args.text or []]
    os.chdir(ROOT)  # so that the printed commands are those to type
    for stop in (signal.SIGINT, signal.SIGTERM):  # the same as Ctrl-C
        signal.signal(stop, signal.default_int_handler)
    # Beside another busy process, spinning OpenMP threads make a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        run(args.folder, texts, args.updates)
    except KeyboardInterrupt:
        console.print("\nstopped; `make demo` resumes here")
        return 130
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except subprocess.CalledProcessError as error:
        command = shlex.join(error.cmd)
        console.print(f"failed ({error.returncode}): {command}", style="red", markup=False)
        return 1
    return 0


def run(folder: Path, texts: list[str], num_updates: int) -> None:
    start = time.time()
    data, model = folder / "data", folder / "model"
    folder.mkdir(exist_ok=True)
    remember_inputs(folder, texts)

    step("1/5 text")
    texts = texts or [make_text(folder / "english.txt")]
    step("2/5 text to data")
    inputs = [part for text in texts for part in ("--input", text)]
    sizes = ["--train-vocab", str(VOCAB_SIZE), "--valid-fraction", "0.04"]
    subprocess.run(
        command("metro", "prepare-text", *inputs, "--out", str(data), *sizes), check=True
    )
    step("3/5 pretraining")
    pretrain(data, model, num_updates)
    step("4/5 curves")
    curves = read_log(model)
    picture = folder / "losses.png"
    draw(curves, picture)
    console.print(f"drawn: {picture}")
    step("5/5 what it has learnt")
    show(model, data)
    step("done")
    report(curves, folder, time.time() - start)


def step(title: str) -> None:
    console.rule(f"[bold]{title}", align="left")


def remember_inputs(folder: Path, texts: list[str]) -> None:
    """The folder belongs to one text."""
    path = folder / "inputs.json"
    if path.exists() and (earlier := json.loads(path.read_text())) != texts:
        raise UserError(
            f"{folder}/ was made from {earlier or 'the default text'}, not from "
            f"{texts or 'the default text'}: remove it first (rm -r {folder})"
        )
    path.write_text(json.dumps(texts))


def make_text(path: Path) -> str:
    if path.exists():
        console.print(f"{path} is there")
    else:
        console.print("reading the documentation in the installed Python packages ...")
        written = write_demo_text(path, TEXT_BYTES)
        console.print(f"written: {path}, {written / 1e6:.1f} MB of English text")
    return str(path)


def command(*words: str) -> list[str]:
    """Of console scripts of this environment, activated or not; shown as one would type it."""
    console.print(f"$ {shlex.join(words)}", style="bold", markup=False)
    folder = Path(sysconfig.get_path("scripts"))
    return [str(folder / word) if word in ("metro", "torchrun") else word for word in words]


def pretrain(data: Path, model: Path, num_updates: int) -> None:
    """Train; Ctrl-C comes here and there, and the training saves and stops.

    The model is too small to keep two cores busy, so two processes share each batch where there is
    no GPU.
    """
    processes = 1 if torch.cuda.is_available() else min(2, available_cores())
    launcher = ["torchrun", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = {
        "--config": "metro_t5_tiny",
        "--data": str(data),
        "--output-dir": str(model),
        "--max-tokens": str(BATCH_TOKENS // processes),
        "--max-update": str(num_updates),
        "--log-interval": str(min(20, num_updates)),  # a short run has a curve too
    }
    parts = [part for option in options.items() for part in option]
    argv = command(*launcher, "metro", "pretrain", *parts, "--keep-auxiliary")
    # torchrun would set the number of threads of each process itself, with a warning.
    threads = {"OMP_NUM_THREADS": "1"} if launcher else {}
    process = subprocess.Popen(argv, env={**os.environ, **threads})
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)


def show(folder: Path, data: Path) -> None:
    """Examples, and the numbers beside what they must reach."""
    probe = Probe.load(folder, data)
    threshold = probe.threshold()
    probe.show(threshold, console)
    scores = probe.score(threshold, bigram_bits(data))
    console.print("On the second half of the held-out text:")
    for line, reached in scores.gate.items():
        mark = "[green]yes[/]" if reached else "[red]no [/]"
        console.print(f"  {mark} {line}")
    console.print(f"  {scores.precision:.0f} % of the tokens that the RTD head marks were planted")
    console.print(f"  the decoder copies {scores.copied:.1f} % of the other tokens")


def report(curves, folder: Path, seconds: float) -> None:
    """Print the results in numbers, and the commands to type next."""
    train, valid = curves["train"], curves["valid"]
    console.print("loss in bits         training            validation")
    for name, meaning in LOSSES.items():
        line = f"{name:19}"
        for curve in (train.get(name), valid.get(name)):
            ends = f"{curve.values[0]:6.3f} -> {curve.values[-1]:6.3f}" if curve else "-"
            line += f"  {ends:18}"
        console.print(f"{line}  {meaning}", markup=False)
    tokens = (folder / "data/train.bin").stat().st_size // 2  # ids of 2 bytes
    num_updates = max(split["loss"].updates[-1] for split in (train, valid) if "loss" in split)
    console.print(
        f"{num_updates} updates of METRO on {tokens:,} tokens of text; "
        f"this call took {seconds / 60:.1f} minutes."
    )
    console.print(
        "\nNext:\n"
        f"  look at the curves      {folder}/losses.png\n"
        f"  ask the model           .venv/bin/metro generate {folder}/model 'A text of yours.'\n"
        f"  read its card           {folder}/model/README.md\n"
        "  train longer            make demo ARGS='--updates 10000'\n"
        f"  take your own text      rm -r {folder}; make demo DEMO_TEXT=my.txt\n"
        "  see what is installed   .venv/bin/metro doctor\n"
        "  pretrain METRO-base     docs/pretraining.md",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
