"""What ``metro evaluate`` does: check, load a model once, run, sum up."""

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metro.evaluation.tasks.suites import Suite, find_suite
from metro.utils.messages import UserError, counted
from metro.utils.progress import Progress

MISSING_DATA = 3
"""Exit status where tasks were left out for want of data."""


@dataclass
class EvaluationCommand:
    """The options of the command line, by their names there."""

    models: list[str]
    suite: str
    out: Path
    method: str | None
    protocol: str | None
    tasks: list[str]
    prompts: list[str]
    limit: int | None
    split: str | None
    data_dir: Path | None
    templates: Path | None
    bigbench_dir: Path | None
    normalization: str
    instruction_text: str
    label_words: str
    max_source_length: int | None
    max_target_length: int | None
    vocab: Path | None
    dtype: str
    attention: str | None
    device: str | None
    batch_tokens: int | None
    seed: int
    run_name: str | None
    allow_missing: bool
    check_published: bool
    tolerance: float
    overwrite: bool

    def run(self) -> int:
        """Evaluate all models; the exit status.

        Raises:
            ValueError: something cannot be run; or, when everything has been, a model misses its
                published numbers.
        """
        whole = find_suite(self.suite)
        chosen = whole.narrowed(self.tasks, self.prompts)
        self.check_options(whole)
        from metro.evaluation.tasks.loading import Sources, load_tasks

        sources = Sources(
            self.data_dir,
            self.templates,
            self.bigbench_dir,
            self.split,
            self.limit,
            self.instruction_text,
            self.label_words,
            self.seed,
        )
        tasks, missing = load_tasks(chosen, sources)
        if not tasks:
            first = next(iter(missing.values()), "no prompt is left")
            raise UserError(f"no task of {whole.name} can be evaluated: {first}")
        from metro.evaluation.runs.processes import join_processes  # and torch with it
        from metro.evaluation.scoring.rank_classification import NORMALIZATIONS

        check_choice("--normalization", self.normalization, NORMALIZATIONS)
        processes = join_processes(self.device)
        try:
            failures = [
                failure
                for name in self.models
                if (failure := self.evaluate_model(name, whole, tasks, sources, processes))
            ]
        finally:
            processes.close()
        if missing and processes.is_first:
            print(f"left out for want of data, {counted(len(missing), 'task')}:", file=sys.stderr)
            for task, reason in missing.items():
                print(f"  {task}: {reason}", file=sys.stderr)
            if not self.allow_missing:
                print("--allow-missing makes this no failure", file=sys.stderr)
        if failures:
            raise UserError("; ".join(failures))
        return MISSING_DATA if missing and not self.allow_missing else 0

    def check_options(self, suite: Suite) -> None:
        """What can be wrong without looking at data or importing torch."""
        from metro.data.prompts.instruction import INSTRUCTION_TEXTS
        from metro.evaluation.runs.published import published_values
        from metro.evaluation.tasks.protocol import PROTOCOLS
        from metro.models.registry import METHODS, registered_model
        from metro.models.source import model_source

        for name in self.models:
            model_source(name)
        check_choice("--method", self.method, (None, *METHODS))
        check_choice("--protocol", self.protocol, (None, *PROTOCOLS))
        check_choice("--instruction-text", self.instruction_text, INSTRUCTION_TEXTS)
        if self.run_name and len(self.models) > 1:
            raise UserError("--run-name names one run, but there are several models; leave it out")
        if self.run_name and Path(self.run_name).name != self.run_name:
            raise UserError(f"--run-name is {self.run_name!r}; use a name without slashes")
        folders: dict[str, str] = {}
        for name in self.models if len(self.models) > 1 else ():
            folder = self.folder_name(name)
            if folder in folders:
                raise UserError(
                    f"models {folders[folder]} and {name} would share the run folder {folder}-"
                    f"{suite.name}; evaluate them one at a time, each with a --run-name of its own"
                )
            folders[folder] = name
        if self.check_published:
            if self.limit is not None:
                raise UserError("--check-published needs all rows: leave --limit out")
            for name in self.models:
                registered = registered_model(name)
                published_values(registered, suite.name, self.method or registered.method)

    def method_of(self, name: str) -> str:
        """The method that a model is evaluated with."""
        from metro.models.registry import find_registered

        registered = find_registered(name)
        return self.method or (registered.method if registered else "direct")

    def folder_name(self, name: str) -> str:
        """What a run folder is called by default, up to the suite."""
        return f"{short_name(name)}-{self.method_of(name)}"

    def evaluate_model(self, name, whole, tasks, sources, processes) -> str | None:
        """One model on all tasks, loaded once; how it misses its published numbers, if it does."""
        from transformers.utils.logging import disable_progress_bar

        from metro.evaluation.runs.run_folder import RunFolder, read_run
        from metro.evaluation.runs.runner import Settings, environment_versions, evaluate, run_info
        from metro.evaluation.runs.summary import summarize, write_summary
        from metro.evaluation.tasks.protocol import choose_protocol
        from metro.fuse import fuse
        from metro.modeling.configuration_metro_t5 import MetroT5Config
        from metro.models.loading import load
        from metro.models.registry import find_registered

        disable_progress_bar()  # of loading weights; ours is over the suite
        registered = find_registered(name)
        method = self.method_of(name)
        screen = Progress(processes.is_first)
        screen.say(f"loading {name}")
        model, tokenizer = load(
            name,
            dtype=self.dtype,
            device=processes.device,
            attn_implementation=self.attention,
            vocab=self.vocab,
        )
        if processes.device.type == "cuda" and isinstance(model.config, MetroT5Config):
            fuse(model)  # on the CPU packed_scoring.py does more
        batch_tokens = self.batch_tokens
        if batch_tokens is None:
            batch_tokens = 65536 if processes.device.type == "cuda" else 4096
        settings = Settings(method, self.normalization, batch_tokens)
        protocol = choose_protocol(
            self.protocol or (registered.family if registered else None),
            model.config,
            method,
            max_source_length=self.max_source_length,
            max_target_length=self.max_target_length,
        )
        folder = None
        if processes.is_first:
            path = self.out / (self.run_name or f"{self.folder_name(name)}-{whole.name}")
            if self.overwrite and (path / "run.json").is_file():
                shutil.rmtree(path)
            info = run_info(
                name, registered.name if registered else None, model, whole, sources, protocol,
                settings, environment_versions(),
            )  # fmt: skip
            folder = RunFolder(path, info)
            screen.say(f"{name} on {whole.title}, method {method}, into {path}")
            screen.say(f"protocol {protocol.describe()}")
        outcome = evaluate(
            model, tokenizer, tasks, folder, whole.name, protocol, settings, processes, screen
        )
        screen.__exit__()
        if folder is None:
            return None
        run = read_run(folder.folder)
        summary = summarize(run)
        write_summary(summary, folder.folder / "summary.json")
        print(summary.table())
        if outcome.num_new == 0:
            screen.say("everything was there already; nothing was computed")
        if not self.check_published:
            return None
        from metro.evaluation.runs.published import check_published

        check = check_published(summary, registered, self.tolerance)
        screen.say(check.table)
        return check.failure


def check_choice(option: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        names = ", ".join(name for name in known if name)
        raise UserError(f"{option} is {value!r}; use one of {names}")


def short_name(model: str) -> str:
    """A folder name for a model: the last parts of a path or hub id."""
    path = Path(model.rstrip("/"))
    parts = path.parts[-2:] if path.suffix == ".pt" else path.parts[-1:]
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", "_".join(parts).removesuffix(".pt")).strip("._")
