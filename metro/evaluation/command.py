"""What ``metro evaluate`` does: check, load a model once, run, sum up."""

import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from metro.evaluation.suites import find_suite

MISSING_DATA = 3
"""Exit status where tasks were left out for want of data."""


@dataclass
class EvaluationCommand:
    """The options of the command line, by their names there."""

    models: list[str]
    suite: str
    out: Path
    method: str | None
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
        """Evaluate all models; the exit status."""
        whole = find_suite(self.suite)
        chosen = whole.narrowed(self.tasks, self.prompts)
        self.check_options()
        from metro.evaluation.processes import join_processes
        from metro.evaluation.runner import load_tasks
        from metro.evaluation.tasks import Sources

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
            raise ValueError(f"no task of {whole.name} can be evaluated: {first}")
        processes = join_processes(self.device)
        try:
            for name in self.models:
                self.evaluate_model(name, whole, tasks, missing, sources, processes)
        finally:
            processes.close()
        if missing and processes.is_first:
            print(f"{len(missing)} tasks were left out, their data are missing:", file=sys.stderr)
            for task, reason in missing.items():
                print(f"  {task}: {reason}", file=sys.stderr)
            if not self.allow_missing:
                print("--allow-missing makes this no failure", file=sys.stderr)
        return MISSING_DATA if missing and not self.allow_missing else 0

    def check_options(self) -> None:
        """What can be wrong without looking at a model."""
        from metro.conversion.registry import registered_models
        from metro.data.instruction import INSTRUCTION_TEXTS
        from metro.evaluation.rank_classification import METHODS, NORMALIZATIONS

        for option, value, known in (
            ("--method", self.method, (None, *METHODS)),
            ("--normalization", self.normalization, NORMALIZATIONS),
            ("--instruction-text", self.instruction_text, INSTRUCTION_TEXTS),
        ):
            if value not in known:
                names = ", ".join(name for name in known if name)
                raise ValueError(f"{option} is {value!r}; use one of {names}")
        if self.run_name and len(self.models) > 1:
            raise ValueError("--run-name names one run, but there are several models; leave it out")
        if self.run_name and Path(self.run_name).name != self.run_name:
            raise ValueError(f"--run-name is {self.run_name!r}; use a name without slashes")
        if self.check_published:
            for name in self.models:
                if name not in registered_models():
                    raise ValueError(
                        f"--check-published: {name} is no registered model; `metro models` lists "
                        "them"
                    )
            if self.limit is not None:
                raise ValueError("--check-published needs all rows: leave --limit out")

    def evaluate_model(self, name, whole, tasks, missing, sources, processes) -> None:
        """One model on all tasks, loaded once."""
        from transformers.utils.logging import disable_progress_bar

        from metro.conversion.loading import load
        from metro.conversion.registry import registered_models
        from metro.evaluation.protocol import choose_protocol
        from metro.evaluation.results import read_run
        from metro.evaluation.run_folder import RunFolder
        from metro.evaluation.runner import Settings, environment_versions, evaluate, run_info
        from metro.evaluation.summary import print_summary, summarize, write_summary

        disable_progress_bar()  # of loading weights; ours is over the suite
        registered = registered_models().get(name)
        method = self.method or (registered.method if registered else "direct")
        model, tokenizer = load(
            name,
            dtype=self.dtype,
            device=processes.device,
            attn_implementation=self.attention,
            vocab=self.vocab,
        )
        batch_tokens = self.batch_tokens
        if batch_tokens is None:
            batch_tokens = 65536 if processes.device.type == "cuda" else 4096
        settings = Settings(method, self.normalization, batch_tokens)
        protocol = choose_protocol(
            registered.family if registered else None,
            model.config,
            method,
            max_source_length=self.max_source_length,
            max_target_length=self.max_target_length,
        )
        folder = None
        screen = Screen(processes.is_first)
        if processes.is_first:
            path = self.out / (self.run_name or f"{short_name(name)}-{method}-{whole.name}")
            if self.overwrite and (path / "run.json").is_file():
                shutil.rmtree(path)
            info = run_info(
                name, registered.name if registered else None, model, whole, sources, protocol,
                settings, environment_versions(),
            )  # fmt: skip
            folder = RunFolder(path, info)
            screen.print(f"{name} on {whole.title}, method {method}, into {path}")
            screen.print(f"protocol {protocol.describe()}")
        outcome = evaluate(
            model, tokenizer, tasks, folder, whole.name, protocol, settings, processes, screen
        )
        if folder is None:
            return
        run = read_run(folder.folder)
        summary = summarize(run)
        write_summary(summary, folder.folder / "summary.json")
        print_summary(summary)
        if outcome.num_new == 0:
            screen.print("everything was there already; nothing was computed")
        if self.check_published:
            from metro.evaluation.published_check import check_published

            screen.print(check_published(summary, registered, self.tolerance))


def short_name(model: str) -> str:
    """A folder name for a model: the last parts of a path or hub id."""
    path = Path(model.rstrip("/"))
    parts = path.parts[-2:] if path.suffix == ".pt" else path.parts[-1:]
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", "_".join(parts).removesuffix(".pt")).strip("._")


class Screen:
    """Progress over the whole suite on a terminal; a line per prompt elsewhere."""

    def __init__(self, is_first: bool):
        from rich.console import Console

        self.console = Console(stderr=True, quiet=not is_first, soft_wrap=True)
        self.bar = self.job = None

    def print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    note = print

    @contextmanager
    def start(self, total: float, done: float):
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, speed_estimate_period=600,
                      disable=not self.console.is_terminal) as self.bar:  # fmt: skip
            self.job = self.bar.add_task("", total=max(total - done, 1e-9))
            yield

    def advance(self, task: str, prompt: str, done: float) -> None:
        from rich.markup import escape

        self.bar.update(self.job, completed=done, description=escape(f"{task} / {prompt}"))

    def finished(self, result) -> None:
        self.print(
            f"{result.task} / {result.prompt}: {100 * result.accuracy:.2f} % of "
            f"{result.num_examples}, {result.seconds:.1f} s"
        )
