"""What settings of `metro_t5_tiny` are worth: a change at a time, with two seeds; some for longer.

    python scripts/ablation.py --data demo/data

Each run trains on the text of `make demo`, those of a table on as many tokens, and is measured as
the demo is: the threshold of the RTD head is set on one half of the held-out text, the numbers are
of the other. They are of the half that the demo does not report, so that settings can be chosen by
them. One process with one thread makes the runs one after the other, and writes one JSON file each;
the same command resumes, and started twice it shares them. At the end the tables are written into
docs/pretraining.md.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")  # before torch is imported

from demo_probe import Probe, bigram_bits
from evidence_report import table

import metro
from metro.pretraining.settings import PretrainingSettings
from metro.utils.files import read_json, write_json, write_text
from metro.utils.locks import locked
from metro.utils.messages import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/pretraining.md"
BEGIN, END = "<!-- ablation: written by `python scripts/ablation.py` -->\n", "<!-- end -->\n"
SEEDS = (1, 2)
UNSET = {"init_token_std": None, "init_position_std": None, "init_auxiliary_std": None}
BASE = {"rtd_loss_weight": 50.0}
"""What all changes are made to, beside metro_t5_tiny, which has learnt its own value from them."""
CHANGES: tuple[dict, ...] = (
    {},
    {"init_neighbour_slope": 0.0},
    {"init_copy_gain": 0.0},
    {"init_token_std": None},
    {"init_position_std": None},
    {"init_auxiliary_std": None},
    {**UNSET, "init_neighbour_slope": 0.0, "init_copy_gain": 0.0},
    {"mask_prob": 0.15},
    {"masked_positions_only": "lm"},
    {"weighted_lm_loss": True},
    {"rtd_loss_weight": 10.0},
    {"rtd_loss_weight": 200.0},
    {"clip_norm": 0.0},
    {"clip_norm": 0.5},
    {"dropout": 0.1, "attention_dropout": 0.1},
    {"lr": 0.001},
    {"lr": 0.004},
    {"max_tokens": 512},
    {"max_tokens": 2048},
    {"tokens_per_sample": 64, "max_positions": 64},
)
"""Options of `metro pretrain`."""
LASTING: tuple[dict, ...] = (
    {},
    {"rtd_loss_weight": 10.0},
)
"""Trained as long as the demo is."""
SHORT, LONG = 400, 2000
"""Updates of `BATCH_TOKENS`."""
BATCH_TOKENS = 1024  # of metro_t5_tiny
MEASURES = {
    "auxiliary_bits": "auxiliary bits",
    "recall": "detected, %",
    "false_alarms": "false positives, %",
    "restored": "corrected, %",
    "restored_by_bigram": "a follower, %",
    "copied": "copied, %",
}


class Run(NamedTuple):
    """One training: a change, a seed, and for how long."""

    change: dict
    seed: int
    updates: int = SHORT

    @property
    def title(self) -> str:
        named = {n: "null" if value is None else value for n, value in self.change.items()}
        if named.keys() > UNSET.keys():
            return "all `init_` settings as published"
        parts = [f"`{name}={value}`" for name, value in (named or BASE).items()]
        return " ".join(parts if named else ["`metro_t5_tiny` with", *parts])

    @property
    def name(self) -> str:
        changed = "-".join(f"{name}-{value}" for name, value in self.change.items())
        return f"{changed or 'tiny'}-u{self.updates}-s{self.seed}"

    def settings(self, given: Mapping) -> PretrainingSettings:
        tiny = PretrainingSettings.read("metro_t5_tiny")
        return PretrainingSettings(**{**tiny, **given, **BASE, **self.change})

    def make(self, data: Path, out: Path) -> dict:
        """Train and measure."""
        share = self.change.get("max_tokens", BATCH_TOKENS) / BATCH_TOKENS
        updates = round(self.updates / share)
        model = out / self.name
        given = dict(
            data=str(data),
            output_dir=str(model),
            seed=self.seed,
            max_update=updates,
            warmup_updates=updates // 10,
            disable_validation=True,
            keep_auxiliary=True,
            cpu=True,
            precision="fp32",
            report_to="none",
        )
        metro.pretrain(self.settings(given), progress=False)
        probe = Probe.load(model, data, half=0)
        scores = probe.score(probe.threshold(), bigram_bits(data))
        bits = read_json(data / "prepare_text.json")["reference_bits"]
        return {"updates": updates, "reference_bits": bits, **scores._asdict()}


RUNS = tuple(
    Run(change, seed, updates)
    for updates, changes in ((SHORT, CHANGES), (LONG, LASTING))
    for change in changes
    for seed in SEEDS
)


def work_through(runs: Sequence[Run], results: Path, data: Path, out: Path) -> None:
    """Make all runs that have no result; those that another process is making are left to it."""
    for run in runs:
        path = results / f"{run.name}.json"
        with ExitStack() as lock:
            try:
                lock.enter_context(locked(out / run.name))
            except UserError:
                continue
            if not path.exists():
                print(run.name, flush=True)
                write_json(path, run.make(data, out), indent=1)


def text_of(runs: Sequence[Run], results: Path) -> str:
    """A table for each length of training and what it is of, as Markdown.

    Raises:
        UserError: a run has no result yet.
    """
    found = {run.name: read_json(results / f"{run.name}.json") for run in runs}
    if missing := [name for name, result in found.items() if result is None]:
        raise UserError(f"{len(missing)} of {len(runs)} runs are not done, such as {missing[0]}")
    reference = found[runs[0].name]["reference_bits"]
    bits = ", ".join(f"{n} {reference[n]:.2f}" for n in ("unigram", "bigram", "trigram"))
    tables = []
    for updates in dict.fromkeys(run.updates for run in runs):
        of_length = [run for run in runs if run.updates == updates]
        rows = []
        for title in dict.fromkeys(run.title for run in of_length):
            results_S = [found[run.name] for run in of_length if run.title == title]
            rows.append([title, *(cell(name, results_S) for name in MEASURES)])
        size = f"{updates:,} updates of {BATCH_TOKENS:,} tokens, or as many tokens"
        tables.append(f"{size} ({bits} bits):\n\n{table(['', *MEASURES.values()], rows)}\n")
    return "\n".join(tables)


def cell(name: str, results_S: Sequence[dict]) -> str:
    """Mean over seeds and, in brackets, each seed."""
    values = [result[name] for result in results_S]
    digits = 2 if name == "auxiliary_bits" else 1
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean(values):.{digits}f} ({each})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "demo/data", help="default demo/data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/ablation")
    parser.add_argument("--page", type=Path, default=PAGE, help="it has the two marks")
    options = parser.parse_args()
    for folder in (options.out, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        work_through(RUNS, options.results, options.data, options.out)
        page, text = options.page.read_text(), text_of(RUNS, options.results)
        if BEGIN not in page:
            raise UserError(f"{options.page} has no line {BEGIN.strip()}: put it and {END.strip()}")
        before, _, rest = page.partition(BEGIN)
        write_text(options.page, before + BEGIN + text + END + rest.partition(END)[2])
        print(f"written: {options.page}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
