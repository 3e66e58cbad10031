"""Compare pretraining objectives at small scale, with seeds and intervals, from one plan file.

    python scripts/evidence.py benchmarks/evidence/cpu.yaml --text english.txt.gz --data-dir ROWS \\
        --out runs/evidence

Every arm of the plan has the same sizes, vocabulary, data order, optimiser and initialisation rule;
it is pretrained by fairseq with the project's plugins, scored on minimal pairs, and finetuned by
`metro finetune` on each dataset. First, on the tuning seed, the rates of each arm are chosen by
accuracy on rows held out of the training rows; then all seeds run with the choice, and accuracy is
that of the test rows. Each run is one process with one thread, resumes where it was stopped, and
writes one JSON file when it is done. The same command started twice shares the runs. At the end, or
with --report at any time, table, intervals and figure are made of the JSON files.

The keys of a plan are explained in benchmarks/evidence/cpu.yaml.

Why more than 400 lines: one comparison, from a plan to its table, read from top to bottom.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")  # before torch is imported

from evidence_data import prepare
from evidence_report import read_results, write_report
from plot_training import read_log

import metro
from metro.conversion.fairseq_to_hf import to_hf
from metro.evaluation.runs.run_folder import read_run
from metro.models.fairseq_checkpoint import read_checkpoint
from metro.utils.files import read_json, read_yaml, write_json
from metro.utils.locks import locked
from metro.utils.messages import UserError

ROOT = Path(__file__).resolve().parent.parent
CURVES = (
    *("loss", "nll_loss", "generator_loss", "rtd_loss", "rtd_label_entropy", "replaced_accuracy"),
    *("rtd_replaced_accuracy", "unigram_bits", "bigram_bits", "trigram_bits"),
)
"""Validation curves that a result keeps."""
TIMED_UPDATES = (20, 120)
TIMED_ROUNDS = 5


@dataclass(frozen=True)
class Study:
    """A plan, and where its data and runs are."""

    plan: dict
    text: Path
    data_dir: Path
    out: Path
    results: Path

    @cached_property
    def seconds_per_update(self) -> dict[str, float]:
        """Arm -> CPU seconds of an update (on a GPU, of the clock), measured once for each kind.

        The kinds take turns, and the median of each counts.
        """
        path = self.out / "timing.json"
        trained = {n: arm for n, arm in self.plan["arms"].items() if not arm.get("untrained")}
        with waiting(path):
            if (found := read_json(path)) is not None:
                return found
            kinds = {n: json.dumps([a["configuration"], a.get("set")]) for n, a in trained.items()}
            one_of_each = {kind: name for name, kind in kinds.items()}
            rounds = [
                {kind: self.measure(name) for kind, name in one_of_each.items()}
                for _ in range(TIMED_ROUNDS)
            ]
            found = {n: median(each[kind] for each in rounds) for n, kind in kinds.items()}
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

    def tune(self) -> dict[str, tuple[float, float]]:
        """Choose the rates of pretraining and finetuning of each arm, one after the other.

        By accuracy on held-out training rows of the tuning seed; test rows are not looked at.
        """
        plan, rates = self.plan, self.plan["finetuning"]["rates"]
        seed, middle = plan["tuning_seed"], rates[len(rates) // 2]

        def best(runs: list[Run]) -> list[Run]:
            work_through(runs)
            by_arm = ([run for run in runs if run.arm == arm] for arm in plan["arms"])
            return [max(tried, key=lambda run: run.tune_accuracy()) for tried in by_arm]

        first = best([
            Run(self, arm, seed, rate, middle, True)
            for arm, options in plan["arms"].items()
            for rate in options.get("rates", [0.0])
        ])  # fmt: skip
        second = best([replace(run, finetuning_rate=rate) for run in first for rate in rates])
        return {run.arm: (run.rate, run.finetuning_rate) for run in second}


@dataclass(frozen=True)
class Run:
    """One model: pretraining, minimal pairs, finetuning on every dataset."""

    study: Study
    arm: str
    seed: int
    rate: float
    finetuning_rate: float
    tuning: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.rate:g}-s{self.seed}{'-tuning' * self.tuning}"

    @property
    def folder(self) -> Path:
        return self.study.out / "runs" / self.name

    @property
    def record(self) -> dict:
        return read_json(self.folder / "record.json") or {}

    @property
    def datasets(self) -> dict[str, str]:
        """Dataset -> its key in the record, which has the rate of finetuning."""
        return {name: f"{name} {self.finetuning_rate:g}" for name in self.study.plan["datasets"]}

    def is_done(self) -> bool:
        published = self.tuning or (self.study.results / f"{self.name}.json").is_file()
        found = self.record.get("finetuning", {})
        return published and all(key in found for key in self.datasets.values())

    def tune_accuracy(self) -> float:
        found = self.record["finetuning"]
        return sum(found[key]["tune"] for key in self.datasets.values()) / len(self.datasets)

    def keep(self, part: str, facts: dict) -> None:
        """Add facts to a part of the record on disk."""
        record = self.record
        record[part] = record.get(part, {}) | facts
        write_json(self.folder / "record.json", record)

    def do(self) -> None:
        """Do what is not done yet, and publish the result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        study, model = self.study, self.folder / "model"
        options = study.plan["arms"][self.arm]
        if "pretraining" not in self.record:
            say(f"{self.name}: pretraining")
            updates = study.updates(self.arm, self.tuning)
            pretrain(study, self.arm, self.rate, self.seed, updates, self.folder)
            checkpoint = self.folder / "checkpoint_last.pt"
            done = read_checkpoint(checkpoint).history[-1]["num_updates"]
            if done < updates:
                raise UserError(f"{self.name} stopped after {done} of {updates} updates: run again")
            to_hf(checkpoint, model, vocab=study.out / "text", keep_auxiliary=True, overwrite=True)
            curves = read_log(self.folder / "pretraining.log")
            tokens = curves["train"].get("wpb")
            facts = {
                "updates": updates,
                "tokens_per_update": sum(tokens.values) / len(tokens.values) if tokens else 0,
                "valid": {n: list(c) for n, c in curves["valid"].items() if n in CURVES},
            }
            self.keep("pretraining", facts)
        methods = ["decoder", *(["rtd"] if options.get("rtd") else [])]
        for method in methods if study.plan.get("blimp_limit") else []:
            if method not in self.record.get("blimp", {}):
                say(f"{self.name}: minimal pairs, {method}")
                self.keep("blimp", {method: self.minimal_pairs(model, method)})
        for name, key in self.datasets.items():
            if key not in self.record.get("finetuning", {}):
                say(f"{self.name}: finetuning on {key}")
                self.keep("finetuning", {key: self.finetune(model, name)})
        if not self.tuning:
            write_json(study.results / f"{self.name}.json", self.result(), indent=1)

    def minimal_pairs(self, model: Path, method: str) -> dict:
        evaluation = metro.evaluate(
            str(model),
            suite="blimp",
            method=method,
            data_dir=self.study.data_dir,
            limit=self.study.plan["blimp_limit"],
            out=self.folder / "pairs",
            device="cpu" if self.study.plan["cpu"] else None,
            progress=False,
        )
        summary = evaluation.summary
        paradigms = {p: a for task in summary.tasks.values() for p, a in task.accuracies.items()}
        return {"question": summary.question, "paradigms": paradigms}

    def finetune(self, model: Path, dataset: str) -> dict:
        """Accuracy on held-out training rows, and which test rows are answered rightly."""
        plan, place = self.study.plan, self.study.out / "tasks" / dataset
        options = {k: v for k, v in plan["finetuning"].items() if k != "rates"}
        folder = self.folder / f"finetuned-{dataset}-{self.finetuning_rate:g}"
        given = dict(
            model=str(model),
            data=str(place / "prompts"),
            output_dir=str(folder / "model"),
            learning_rate=self.finetuning_rate,
            seed=self.seed,
            use_cpu=plan["cpu"],
            save_steps=0.5,
            report_to="none",
            **options,
        )
        metro.finetune(**given, progress=False)
        found = {}
        for part in ("tune", "test"):
            evaluation = metro.evaluate(
                given["output_dir"],
                suite=str(place / f"{part}.yaml"),
                out=folder / "evaluation",
                max_source_length=options["max_input_length"],
                device="cpu" if plan["cpu"] else None,
                progress=False,
            )
            run = read_run(evaluation.folder)
            found[part] = [score.right for score in run.scores(run.results[0]) or []]
        shutil.rmtree(folder)
        right = "".join(str(int(each)) for each in found["test"])
        return {"tune": sum(found["tune"]) / len(found["tune"]), "right": right}

    def result(self) -> dict:
        """Everything that the report needs of this run."""
        record, study = self.record, self.study
        return {
            "arm": self.arm,
            "seed": self.seed,
            "rate": self.rate,
            "finetuning_rate": self.finetuning_rate,
            "seconds_per_update": study.seconds_per_update.get(self.arm, 0),
            **record["pretraining"],
            "blimp": record.get("blimp", {}),
            "right": {n: record["finetuning"][key]["right"] for n, key in self.datasets.items()},
        }


def pretrain(
    study: Study,
    arm: str,
    rate: float,
    seed: int,
    updates: int,
    folder: Path,
    further: dict | None = None,
) -> None:
    """Run fairseq on an arm; its messages are in pretraining.log, and it resumes by itself."""
    plan, options = study.plan, study.plan["arms"][arm]
    untrained = bool(options.get("untrained"))
    overrides = {
        "common.user_dir": ROOT / "fairseq_plugins",
        "common.seed": seed,
        "common.cpu": plan["cpu"],
        "common.log_interval": max(1, min(50, updates // 4)),
        "task.data": study.out / "text",
        "checkpoint.save_dir": folder,
        "checkpoint.save_interval_updates": plan["validate_every"],
        "dataset.validate_interval_updates": plan["validate_every"],
        "dataset.num_workers": 0,
        "distributed_training.distributed_world_size": 1,
        "optimization.max_update": updates,
        "optimization.lr": f"[{0.0 if untrained else rate}]",
        **plan.get("pretraining", {}),
        **options.get("set", {}),
        **(further or {}),
    }
    configs = ROOT / "fairseq_plugins/configs/pretraining"
    program = Path(sysconfig.get_path("scripts")) / "fairseq-hydra-train"
    argv = [program, "--config-dir", configs, "--config-name", options["configuration"]]
    argv += [f"++{name}={value}" for name, value in overrides.items()]  # also reads True
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "pretraining.log"
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*map(str, argv)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            process.terminate()  # it saves after the current update
            process.wait()
            raise
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise UserError(f"pretraining of {arm} failed ({process.returncode}), see {log}:\n{last}")


def seconds_used(cpu: bool) -> float:
    """CPU seconds of all finished child processes; with a GPU the clock."""
    if not cpu:
        return time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def work_through(runs: Sequence[Run]) -> None:
    """Do all runs; one that another process is doing is left to it, and waited for at the end."""
    while pending := [run for run in runs if not run.is_done()]:
        num_busy = 0
        for run in pending:
            with ExitStack() as lock:
                try:
                    lock.enter_context(locked(run.folder))
                except UserError:
                    num_busy += 1
                    continue
                if not run.is_done():
                    run.do()
        if num_busy == len(pending):
            time.sleep(10)


def waiting(path: Path) -> ExitStack:
    """Lock a path, waiting for another process that has it."""
    stack = ExitStack()
    while True:
        with suppress(UserError):
            stack.enter_context(locked(path))
            return stack
        time.sleep(1)


def say(text) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


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
            chosen = study.tune()
            say(f"rates of pretraining and finetuning: {chosen}")
            work_through(
                [Run(study, arm, seed, *chosen[arm]) for seed in plan["seeds"] for arm in chosen]
            )
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
