"""Compare pretraining objectives at small scale, with seeds and intervals, from one plan file.

    python scripts/evidence.py benchmarks/evidence/cpu.yaml --text english.txt.gz --data-dir ROWS \\
        --out runs/evidence

Every arm of the plan has the same sizes, vocabulary, data order, optimiser and initialisation rule;
it is pretrained by fairseq with the project's plugins, scored on minimal pairs, and finetuned by
`metro finetune` on each dataset. First, on the tuning seed, the rates of each arm are chosen by
accuracy on rows held out of the training rows; then all seeds run with the choice, and accuracy is
that of the test rows. At last the objectives of finetuning, FLIPPED and DIRECT, are compared from
the models of one arm. Each run is one process with one thread, resumes where it was stopped, and
writes one JSON file when it is done. The same command started twice shares the runs; those that
have their JSON file are not made again, and the arm's other seeds take its rates and times: to
repeat them, give another folder of --results. At the end, or with --report at any time, table,
intervals and figure are made of the JSON files.

The keys of a plan are explained in benchmarks/evidence/cpu.yaml.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")  # before torch is imported

from evidence_data import prepare
from evidence_report import read_results, write_report
from evidence_runs import ROOT, ObjectiveRun, PretrainingRun, Run, plan_digest, pretrain, say

from metro.utils.files import read_json, read_yaml, write_json
from metro.utils.locks import locked
from metro.utils.messages import UserError

TIMED_UPDATES = (20, 120)


@dataclass(frozen=True)
class Study:
    """A plan, and where its data and runs are."""

    plan: dict
    text: Path
    data_dir: Path
    out: Path
    results: Path

    def read_result(self, path: Path) -> dict | None:
        """Read a published result, None if there is none.

        Raises:
            UserError: it was made by another plan.
        """
        found = read_json(path)
        if found and found["plan"] != plan_digest(self.plan, found["arm"]):
            raise UserError(
                f"{path} was made when the plan said something else of {found['arm']}: delete it, "
                f"or give another folder of --results"
            )
        return found

    def published(self, arm: str) -> dict | None:
        """Return the result of an arm's first run, None if there is none yet."""
        results = map(self.read_result, sorted(self.results.glob(f"{arm}-*.json")))
        return next((each for each in results if each and each["arm"] == arm), None)

    @cached_property
    def seconds_per_update(self) -> dict[str, float]:
        """Arm -> CPU seconds of an update (on a GPU, of the clock), measured once for each kind.

        The kinds take turns, and the median of each counts. Those of a published result stay.
        """
        path = self.out / "timing.json"
        trained = {n: arm for n, arm in self.plan["arms"].items() if not arm.get("untrained")}
        with waiting(path):
            if (found := read_json(path)) is not None:
                return found
            kinds = {n: json.dumps([a["configuration"], a.get("set")]) for n, a in trained.items()}
            results = {kind: self.published(name) for name, kind in kinds.items()}
            known = {kind: each["seconds_per_update"] for kind, each in results.items() if each}
            one_of_each = {kind: name for name, kind in kinds.items() if kind not in known}
            rounds = [
                {kind: self.measure(name) for kind, name in one_of_each.items()}
                for _ in range(self.plan["timed_rounds"] if one_of_each else 0)
            ]
            known |= {kind: median(each[kind] for each in rounds) for kind in one_of_each}
            found = {name: known[kind] for name, kind in kinds.items()}
            write_json(path, found)
        return found

    def measure(self, arm: str) -> float:
        ends = []
        for updates in TIMED_UPDATES:
            folder = self.out / "timing"
            shutil.rmtree(folder, ignore_errors=True)
            off = {"dataset.disable_validation": True, "checkpoint.no_save": True}
            before = seconds_used(self.plan["cpu"])
            pretrain(self, arm, 0.001, 1, updates, folder, off)
            ends.append(seconds_used(self.plan["cpu"]) - before)
        if ends[1] <= ends[0]:
            raise UserError(f"the time of {arm} could not be measured: leave the machine alone")
        return (ends[1] - ends[0]) / (TIMED_UPDATES[1] - TIMED_UPDATES[0])

    def updates(self, arm: str, tuning: bool) -> int:
        """Updates of an arm: as many as the plan says, or as last as long as another arm's."""
        options, updates = self.plan["arms"][arm], self.plan["updates"]
        if options.get("untrained"):
            return 1
        if tuning:
            updates = self.plan["tuning_updates"]
        if other := options.get("time_of"):
            seconds = self.seconds_per_update
            return round(updates * seconds[other] / seconds[arm])
        return updates

    def tune(self) -> list[PretrainingRun]:
        """Choose the rates of pretraining and finetuning of each arm, one after the other."""
        own = {n: arm for n, arm in self.plan["arms"].items() if "rates_of" not in arm}
        chosen = {run.arm: run for run in self.tune_arms(own)}
        return [
            replace(chosen[options.get("rates_of", name)], arm=name)
            for name, options in self.plan["arms"].items()
        ]

    def tune_arms(self, arms: Mapping[str, Mapping]) -> list[PretrainingRun]:
        rates = self.plan["finetuning"]["rates"]
        seed, middle = self.plan["tuning_seed"], rates[len(rates) // 2]
        first = best([
            PretrainingRun(self, arm, seed, rate, middle, True)
            for arm, options in arms.items()
            for rate in options.get("rates", [0.0])
        ])  # fmt: skip
        return best([replace(run, finetuning_rate=rate) for run in first for rate in rates])

    def run(self) -> None:
        """Make all runs of the plan."""
        chosen, objectives = self.tune(), self.plan.get("objectives")
        self.repeat(chosen)
        if objectives:
            start = next(run for run in chosen if run.arm == objectives["from"])
            tried = [
                ObjectiveRun(self, arm, start.seed, start.rate, rate, True)
                for arm in objectives["arms"]
                for rate in self.plan["finetuning"]["rates"]
            ]
            self.repeat(best(tried))

    def repeat(self, chosen: Sequence[Run]) -> None:
        """Make the chosen runs with every seed, those of the endpoint's arms first."""
        for run in chosen:
            say(f"{run.arm}: rates {run.rate:g} and, of finetuning, {run.finetuning_rate:g}")
        runs = [replace(run, seed=n, tuning=False) for n in self.plan["seeds"] for run in chosen]
        endpoint = sum(self.plan["compare"][: self.plan["primary"]], [])
        work_through(sorted(runs, key=lambda run: run.arm not in endpoint))


def best(runs: Sequence) -> list:
    """Do runs, and return each arm's best; where a result of the arm is published, one like it.

    By accuracy on held-out training rows of the tuning seed; test rows are not looked at. An arm
    with a single run has no choice, and the run is not done.
    """
    tried = {run.arm: [each for each in runs if each.arm == run.arm] for run in runs}
    known = {arm: runs[0].study.published(arm) for arm in tried}
    open_arms = [arm for arm, of_arm in tried.items() if not known[arm] and len(of_arm) > 1]
    work_through([run for arm in open_arms for run in tried[arm]])
    found = []
    for arm, of_arm in tried.items():
        if result := known[arm]:
            rates = {name: result[name] for name in ("rate", "finetuning_rate")}
            found.append(replace(of_arm[0], **rates))
        else:
            one = len(of_arm) == 1
            found.append(of_arm[0] if one else max(of_arm, key=lambda run: run.tune_accuracy()))
    return found


def seconds_used(cpu: bool) -> float:
    """CPU seconds of all finished child processes; with a GPU the clock."""
    if not cpu:
        return time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def work_through(runs: Sequence[Run]) -> None:
    """Do all runs, the first that is left and free each time; another process may share them."""
    while pending := [run.next_to_do() for run in runs if not run.is_done()]:
        if not any(do_if_free(run) for run in pending):
            time.sleep(10)


def do_if_free(run: Run) -> bool:
    """Do a run, False where another process is doing it."""
    with ExitStack() as lock:
        try:
            lock.enter_context(locked(run.folder))
        except UserError:
            return False
        if not run.is_done():
            run.do()
    return True


def waiting(path: Path) -> ExitStack:
    """Lock a path, waiting for another process that has it."""
    stack = ExitStack()
    while True:
        with suppress(UserError):
            stack.enter_context(locked(path))
            return stack
        time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--text", type=Path, help="to pretrain on: plain or jsonl, also .gz")
    parser.add_argument("--data-dir", type=Path, help="rows of the datasets and of BLiMP")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="data and runs")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/evidence/PLAN")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/evidence.md")
    parser.add_argument("--report", action="store_true", help="only write the page")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    results = options.results or ROOT / "benchmarks/results/evidence" / options.plan.stem
    plan = read_yaml(options.plan)
    try:
        if not options.report:
            if not options.text or not options.data_dir:
                parser.error("--text and --data-dir are needed to make runs")
            results.mkdir(parents=True, exist_ok=True)
            study = Study(plan, options.text, options.data_dir, options.out.resolve(), results)
            study.out.mkdir(parents=True, exist_ok=True)
            with waiting(study.out / "prepared"):
                prepare(plan, study.text, study.data_dir, study.out)
            study.run()
        write_report(plan, read_results(results), options.page)
        say(f"written: {options.page}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command resumes here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
