"""Runs of scripts/evidence.py: each is one process with one thread, and writes one JSON file.

A `PretrainingRun` is a model of an arm: pretraining by fairseq, minimal pairs, finetuning on each
dataset. An `ObjectiveRun` finetunes such a model on several datasets at once; a `ModelRun` makes
the model alone, where the result is published and the model is not here.
"""

import hashlib
import json
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from demo_probe import Probe, bigram_bits
from plot_training import read_log

import metro
from metro.conversion.fairseq_to_hf import to_hf
from metro.environment import cpu_name
from metro.evaluation.runs.run_folder import read_run
from metro.models.fairseq_checkpoint import read_checkpoint
from metro.utils.files import read_json, write_json
from metro.utils.messages import UserError

if TYPE_CHECKING:
    from evidence import Study

ROOT = Path(__file__).resolve().parent.parent
CURVES = (
    *("loss", "nll_loss", "generator_loss", "rtd_loss", "rtd_label_entropy", "replaced_accuracy"),
    *("rtd_replaced_accuracy", "rtd_unreplaced_accuracy"),
    *("unigram_bits", "bigram_bits", "trigram_bits"),
)
"""Validation curves that a result keeps."""
DECIDES = (
    *("cpu", "vocab_size", "valid_fraction", "updates", "pretraining"),
    *("blimp_limit", "finetuning", "datasets"),
)
"""Keys of a plan that decide what the runs of all arms find."""


@dataclass(frozen=True)
class Run:
    """What is common to all runs: a folder with a record of the parts that are done."""

    study: "Study"
    arm: str
    seed: int
    rate: float
    """Of pretraining."""
    finetuning_rate: float
    tuning: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.rate:g}-s{self.seed}{'-tuning' * self.tuning}"

    @property
    def folder(self) -> Path:
        return self.study.out / "runs" / self.name

    @property
    def result_path(self) -> Path:
        return self.study.results / f"{self.name}.json"

    @property
    def record(self) -> dict:
        return read_json(self.folder / "record.json") or {}

    def keep(self, part: str, facts: dict) -> None:
        """Add facts to a part of the record on disk."""
        record = self.record
        record[part] = record.get(part, {}) | facts
        write_json(self.folder / "record.json", record)

    @property
    def parts(self) -> dict[str, str]:
        """Finetunings -> their keys in the record, which have the rate of finetuning."""
        raise NotImplementedError

    def is_done(self) -> bool:
        if not self.tuning:
            return self.study.read_result(self.result_path) is not None
        found = self.record.get("finetuning", {})
        return all(key in found for key in self.parts.values())

    def tune_accuracy(self) -> float:
        found = self.record["finetuning"]
        return sum(found[key]["tune"] for key in self.parts.values()) / len(self.parts)

    def next_to_do(self) -> "Run":
        """Return the run that this one starts from where that is not done, else this one."""
        return self

    def do(self) -> None:
        """Do what is not done yet, and publish the result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start, before = time.monotonic(), self.record.get("cost", {}).get("seconds", 0)
        try:
            for step in self.steps():
                say(f"{self.name}: {step}")
        finally:
            seconds = round(before + time.monotonic() - start)
            self.keep("cost", {"cpu": cpu_name(), "seconds": seconds})
        if not self.tuning:
            write_json(self.result_path, self.result(), indent=1)

    def steps(self) -> Iterator[str]:
        """Name each step that is not done yet, then do it."""
        raise NotImplementedError

    def result(self) -> dict:
        """Return everything that the report needs of this run."""
        return {
            "arm": self.arm,
            "plan": plan_digest(self.study.plan, self.arm),
            "seed": self.seed,
            "rate": self.rate,
            "finetuning_rate": self.finetuning_rate,
            "cost": self.record["cost"],
        }

    def finetune(
        self, model: Path, tasks: str, seen: str, method: str = "direct", **options
    ) -> dict[str, dict[str, list[int]]]:
        """Finetune a model, and say which rows of each suite it answers rightly.

        Args:
            model: where it starts.
            tasks: folder of ``out/tasks``.
            seen: names of the suites there.
            method: how rows are scored.
            options: of `metro finetune`, beside the plan's.

        Returns:
            Suite -> dataset -> of each row, the number of prompts under which it is right.
        """
        plan, place = self.study.plan, self.study.out / "tasks" / tasks
        given = {k: v for k, v in plan["finetuning"].items() if k != "rates"} | options
        folder = self.folder / f"finetuned-{tasks}-{self.finetuning_rate:g}"
        metro.finetune(
            model=str(model),
            data=str(place / "prompts"),
            output_dir=str(folder / "model"),
            learning_rate=self.finetuning_rate,
            seed=self.seed,
            use_cpu=plan["cpu"],
            save_steps=0.5,
            report_to="none",
            progress=False,
            **given,
        )
        found: dict[str, dict[str, list[int]]] = {}
        for suite in seen.split():
            evaluation = metro.evaluate(
                str(folder / "model"),
                suite=str(place / f"{suite}.yaml"),
                method=method,
                out=folder / "evaluation",
                max_source_length=given["max_input_length"],
                device="cpu" if plan["cpu"] else None,
                progress=False,
            )
            run = read_run(evaluation.folder)
            found[suite] = {
                task: [
                    sum(int(score.right) for score in of_row)
                    for of_row in zip(*(run.scores(each) or [] for each in results), strict=True)
                ]
                for task, results in run.by_task().items()
            }
        done = self.folder / "finetuned"  # half a folder under its own name could not be resumed
        shutil.rmtree(done, ignore_errors=True)
        shutil.rmtree(folder.rename(done))
        return found


class PretrainingRun(Run):
    """One model: pretraining, minimal pairs, finetuning on every dataset."""

    @property
    def parts(self) -> dict[str, str]:
        return {name: f"{name} {self.finetuning_rate:g}" for name in self.study.plan["datasets"]}

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def steps(self) -> Iterator[str]:
        options = self.study.plan["arms"][self.arm]
        if "pretraining" not in self.record:
            yield "pretraining"
            self.keep("pretraining", self.pretrain())
        methods = ["decoder", *(["rtd"] if options.get("rtd") else [])]
        for method in methods if self.study.plan.get("blimp_limit") else []:
            if method not in self.record.get("blimp", {}):
                yield f"minimal pairs, {method}"
                self.keep("blimp", {method: self.minimal_pairs(method)})
        for name, key in self.parts.items():
            if key not in self.record.get("finetuning", {}):
                yield f"finetuning on {key}"
                found = self.finetune(self.model, name, "tune test")
                facts = {"tune": mean(found["tune"][name]), "right": digits(found["test"][name])}
                self.keep("finetuning", {key: facts})

    def pretrain(self) -> dict:
        study, checkpoint = self.study, self.folder / "checkpoint_last.pt"
        updates = study.updates(self.arm, self.tuning)
        pretrain(study, self.arm, self.rate, self.seed, updates, self.folder)
        done = read_checkpoint(checkpoint).history[-1]["num_updates"]
        if done < updates:
            raise UserError(f"{self.name} stopped after {done} of {updates} updates: run again")
        to_hf(checkpoint, self.model, vocab=study.out / "text", keep_auxiliary=True, overwrite=True)
        curves = read_log(self.folder / "pretraining.log")
        tokens = curves["train"].get("wpb")
        found = {
            "updates": updates,
            "tokens_per_update": sum(tokens.values) / len(tokens.values) if tokens else 0,
            "valid": {n: list(c) for n, c in curves["valid"].items() if n in CURVES},
        }
        if study.plan["arms"][self.arm].get("rtd"):
            text = study.out / "text"
            probe = Probe.load(self.model, text)
            found["probe"] = probe.score(probe.threshold(), bigram_bits(text))._asdict()
        return found

    def minimal_pairs(self, method: str) -> dict:
        evaluation = metro.evaluate(
            str(self.model),
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

    def result(self) -> dict:
        record = self.record
        return {
            **super().result(),
            "seconds_per_update": self.study.seconds_per_update.get(self.arm, 0),
            **record["pretraining"],
            "blimp": record.get("blimp", {}),
            "right": {n: record["finetuning"][key]["right"] for n, key in self.parts.items()},
        }


class ModelRun(PretrainingRun):
    """The pretraining of a model alone; publishes nothing."""

    def is_done(self) -> bool:
        return "pretraining" in self.record

    def do(self) -> None:
        say(f"{self.name}: pretraining")
        self.keep("pretraining", self.pretrain())


class ObjectiveRun(Run):
    """A pretrained model, finetuned with one objective on several datasets at once."""

    @property
    def parts(self) -> dict[str, str]:
        return {"objectives": f"{self.finetuning_rate:g}"}

    @property
    def start(self) -> ModelRun:
        arm = self.study.plan["objectives"]["from"]
        return ModelRun(self.study, arm, self.seed, self.rate, 0, self.tuning)

    def next_to_do(self) -> Run:
        return self if self.start.is_done() else self.start

    def steps(self) -> Iterator[str]:
        plan, key = self.study.plan["objectives"], self.parts["objectives"]
        if key not in self.record.get("finetuning", {}):
            yield f"finetuning at {key}"
            options = plan.get("finetuning", {}) | plan["arms"][self.arm]["set"]
            method = options["objective"].partition("+")[0]
            model = self.start.model
            found = self.finetune(model, "objectives", "tune test unseen", method, **options)
            right = {n: digits(rows) for n, rows in found["test"].items()}
            right |= {f"{n}, unseen": digits(rows) for n, rows in found["unseen"].items()}
            tune = mean([mean(rows) for rows in found["tune"].values()]) / self.num_prompts
            self.keep("finetuning", {key: {"tune": tune, "right": right}})

    @property
    def num_prompts(self) -> int:
        """Of each dataset; `right` has as many as 9 in a digit."""
        datasets = self.study.plan["objectives"]["datasets"].values()
        (number,) = {len(options["prompts"]) for options in datasets}
        return number

    def result(self) -> dict:
        found = self.record["finetuning"][self.parts["objectives"]]
        return {**super().result(), "prompts": self.num_prompts, "right": found["right"]}


def plan_digest(plan: Mapping, arm: str) -> str:
    """Of what a plan says of an arm's runs; titles, rates and what follows from runs left out."""
    objectives = plan.get("objectives", {})
    if arm in plan["arms"]:
        own = [plan["arms"][arm]]
    else:
        own = [objectives, objectives["arms"][arm], plan["arms"][objectives["from"]]]
    left_out = ("title", "rates", "rates_of", "about", "compare", "arms")
    of_arm = [{k: v for k, v in options.items() if k not in left_out} for options in own]
    text = json.dumps([*map(plan.get, DECIDES), of_arm], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digits(right: list[int]) -> str:
    return "".join(map(str, right))


def pretrain(
    study: "Study",
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


def say(text) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
