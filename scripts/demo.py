"""Pretrain a small METRO model on this machine: `make demo`.

Text (the documentation in the installed Python packages, or --text FILE...) -> `metro prepare-text`
-> `fairseq-hydra-train` -> curves. Each step prints its command, as one would type it. Stopped at
any moment and started again it goes on where it was; everything lies in demo/.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from plot_training import LOSSES, draw, parse_line, read_log
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metro.data.demo_text import write_demo_text

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("demo")
CONFIGS = Path("fairseq_plugins/configs/pretraining")
CONFIG = "metro_t5_tiny"
TEXT_BYTES = 6_000_000
VOCAB_SIZE = 4000
NUM_UPDATES = 500
VALIDATE_EVERY = 100

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", nargs="+", help="plain text files, an empty line between documents"
    )
    parser.add_argument("--updates", type=int, default=NUM_UPDATES)
    args = parser.parse_args()
    texts = [str(Path(text).resolve()) for text in args.text or []]
    os.chdir(ROOT)  # so that the printed commands are those to type
    try:
        run(texts, args.updates)
    except KeyboardInterrupt:
        console.print("\nstopped; `make demo` goes on from here")
        return 130
    except (ValueError, FileNotFoundError) as error:
        console.print(f"[red]error:[/] {error}")
        return 2
    except subprocess.CalledProcessError as error:
        console.print(f"[red]failed with status {error.returncode}:[/] {shlex.join(error.cmd)}")
        return 1
    return 0


def run(texts: list[str], num_updates: int) -> None:
    start = time.time()
    DEMO.mkdir(exist_ok=True)
    remember_inputs(texts)
    texts = texts or [make_text()]
    data = DEMO / "data"
    console.rule("2/4 text to data", align="left")
    call("metro", "prepare-text", *input_options(texts), "--out", str(data), *PREPARE_OPTIONS)
    console.rule("3/4 pretraining", align="left")
    log = DEMO / "pretraining.log"
    pretrain(data, log, num_updates)
    console.rule("4/4 curves", align="left")
    curves = read_log(log)
    draw(curves, DEMO / "losses.png")
    console.print(f"drawn: {DEMO / 'losses.png'}")
    console.rule("done", align="left")
    report(curves, data, time.time() - start)


PREPARE_OPTIONS = ["--train-vocab", str(VOCAB_SIZE), "--valid-fraction", "0.02"]


def input_options(texts: list[str]) -> list[str]:
    return [part for text in texts for part in ("--input", text)]


def remember_inputs(texts: list[str]) -> None:
    """A folder belongs to one text."""
    path = DEMO / "inputs.json"
    if path.exists() and json.loads(path.read_text()) != texts:
        raise ValueError(
            f"{DEMO} was made from {json.loads(path.read_text()) or 'the default text'}, not "
            f"{texts or 'the default text'}: remove it first (rm -r {DEMO})"
        )
    path.write_text(json.dumps(texts))


def make_text() -> str:
    console.rule("1/4 text", align="left")
    path = DEMO / "english.txt"
    if path.exists():
        console.print(f"{path} is there")
    else:
        console.print("reading the documentation in the installed Python packages ...")
        written = write_demo_text(path, TEXT_BYTES)
        console.print(f"written: {path}, {written / 1e6:.1f} MB of English text")
    return str(path)


def command(name: str, *options: str) -> list[str]:
    """A console script of this environment, whether it is activated or not."""
    console.print(f"[bold]$ {name} {shlex.join(options)}[/]")
    return [str(Path(sysconfig.get_path("scripts")) / name), *options]


def call(name: str, *options: str) -> None:
    subprocess.run(command(name, *options), check=True)


def pretrain(data: Path, log: Path, num_updates: int) -> None:
    """Run fairseq and turn its JSON lines into a progress bar; all it says is kept in the log."""
    checkpoints = (DEMO / "checkpoints").resolve()
    argv = command(
        "fairseq-hydra-train",
        *("--config-dir", str(CONFIGS.resolve()), "--config-name", CONFIG),
        f"task.data={data.resolve()}",
        f"checkpoint.save_dir={checkpoints}",
        f"optimization.max_update={num_updates}",
        f"dataset.validate_interval_updates={VALIDATE_EVERY}",
        f"checkpoint.save_interval_updates={VALIDATE_EVERY}",
        "common.log_format=json",
        "common.log_interval=10",
        f"hydra.run.dir={(DEMO / 'hydra').resolve()}",
    )
    console.print(f"all messages: {log}")
    bar = Progress(
        TextColumn("update"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    with (
        log.open("a", encoding="utf-8") as file,
        bar,
        subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        task = bar.add_task("", total=num_updates, losses="starting")
        for line in process.stdout:
            file.write(line)
            file.flush()
            stats = parse_line(line)
            if "num_updates" in stats:
                losses = "  ".join(f"{name} {stats[name]}" for name in LOSSES if name in stats)
                bar.update(task, completed=int(stats["num_updates"]), losses=losses)
        if process.wait() == 0:
            bar.update(task, completed=num_updates)
    if process.returncode:
        tail = log.read_text(encoding="utf-8").splitlines()[-15:]
        console.print("\n".join(tail), markup=False)
        raise subprocess.CalledProcessError(process.returncode, argv)


def report(curves, data: Path, seconds: float) -> None:
    """What was done, in numbers, and what to type next."""
    train, valid = curves["train"], curves["valid"]
    updates = train["generator_loss"].updates[-1]
    for name, meaning in LOSSES.items():
        values = train[name].values
        line = f"{name:19} {values[0]:7.3f} -> {values[-1]:7.3f} (train)"
        if name in valid:
            line += f"  {valid[name].values[0]:7.3f} -> {valid[name].values[-1]:7.3f} (valid)"
        console.print(f"{line}  {meaning}")
    console.print(
        f"{updates} updates of METRO on {num_tokens(data):,} tokens of text, "
        f"{seconds / 60:.1f} minutes this time"
    )
    overrides = f"task.data=$PWD/{data} checkpoint.save_dir=$PWD/{DEMO}/checkpoints"
    console.print(
        "\nWhat next:\n"
        f"  the curves           {DEMO}/losses.png\n"
        "  train on             make demo ARGS='--updates 2000'\n"
        "  your own text        rm -r demo; make demo DEMO_TEXT=my.txt\n"
        "  this machine         .venv/bin/metro doctor\n"
        "  the published model  .venv/bin/fairseq-hydra-train "
        f"--config-dir $PWD/{CONFIGS} --config-name metro_t5_base_8gpus {overrides}",
        markup=False,
    )


def num_tokens(data: Path) -> int:
    """Tokens in the training split, from the size of its index of 2-byte ids."""
    return (data / "train.bin").stat().st_size // 2


if __name__ == "__main__":
    sys.exit(main())
