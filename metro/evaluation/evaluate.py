"""Zero-shot evaluation from settings to numbers: `metro.evaluate` and `metro evaluate`.

Wrong settings are refused before torch is imported, which takes seconds.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metro.evaluation.settings import PAIR_METHODS, EvaluationSettings
from metro.evaluation.tasks.own_suite import own_suite
from metro.evaluation.tasks.suites import Suite, find_suite
from metro.models.registry import METHODS
from metro.utils.locks import locked
from metro.utils.messages import UserError
from metro.utils.progress import Progress
from metro.utils.table import Table

if TYPE_CHECKING:
    from metro.evaluation.model import ScoredModel
    from metro.evaluation.runs.published import PublishedCheck
    from metro.evaluation.runs.summary import Summary
    from metro.evaluation.tasks.task import Sources, Task
    from metro.processes import Processes


RENDERING = "data_dir templates bigbench_dir instruction_text label_words seed".split()
"""Settings that make examples of rows; prepared prompts are examples already."""


@dataclass(frozen=True)
class Evaluation:
    """Results of one model on a suite."""

    folder: Path
    """Run folder: results, per-example scores, summary."""
    summary: "Summary"
    """All numbers: of tasks and prompts, averages and intervals; fractions."""
    missing: dict[str, str]
    """Tasks and prompts ("task / prompt") that could not be evaluated -> reason."""
    num_new: int
    """Prompts evaluated in this call; the others were finished before."""
    published: "PublishedCheck | None"
    """Comparison with the published numbers, where it was asked for."""

    @property
    def accuracies(self) -> dict[str, float]:
        """Task -> mean accuracy over its prompts, as a fraction."""
        return {name: task.mean for name, task in self.summary.tasks.items()}

    @property
    def table(self) -> Table:
        """Tasks in rows, numbers in percent; readable as text and in a notebook."""
        return self.summary.table()

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def evaluate(
    model: str | EvaluationSettings, *, progress: bool | Progress = True, **options: Any
) -> Evaluation:
    """Evaluate a model zero-shot by ranking the answer choices of every prompt.

    An interrupted run is resumed by the same call, a narrowed one extended.

    Args:
        model: registered name, hub id, Hugging Face folder or fairseq checkpoint (``.pt``); or
            complete settings.
        progress: show progress on stderr.
        options: fields of `EvaluationSettings`, such as ``suite``, ``data_dir``, ``limit``.

    Returns:
        Its results; of minimal pairs those of the decoder, where several methods apply.

    Raises:
        UserError: a setting is wrong, or the data of no task were found.
    """
    if isinstance(model, EvaluationSettings):
        settings = EvaluationSettings.of(model, **options)
    else:
        settings = EvaluationSettings.of(models=[model], **options)
    if len(settings.models) != 1:
        raise UserError("metro.evaluate takes one model; call it once for each")
    with Progress.of(progress) as shown:
        evaluation, *_ = evaluate_models(settings, shown)
    if isinstance(evaluation, UserError):
        raise evaluation
    return evaluation


def evaluate_models(
    settings: EvaluationSettings, progress: Progress
) -> Iterator[Evaluation | UserError]:
    """Evaluate one model after the other, on data that are loaded once; see `evaluate`.

    Yields:
        The result of each model, or the error that ended its evaluation.
    """
    suite = own_suite(settings, progress) if settings.data else find_suite(settings.suite)
    chosen = suite.narrowed(settings.tasks or [], settings.prompts or [])
    check_method(settings, suite)
    check_models(settings, suite)
    from metro.evaluation.tasks.loading import load_tasks
    from metro.evaluation.tasks.task import Sources

    if all(spec.kind == "prepared" for spec in suite.tasks.values()):
        settings = without_rendering(settings, progress)
    sources = Sources(
        settings.data_dir,
        settings.templates,
        settings.bigbench_dir,
        settings.split,
        settings.limit,
        settings.instruction_text,
        settings.label_words,
        settings.seed,
    )
    tasks, missing = load_tasks(chosen, sources)
    if not tasks:
        first = next(iter(missing.values()), "no prompt is left")
        raise UserError(f"no task of {suite.name} can be evaluated: {first}")
    from metro.processes import join_processes  # and torch with it

    processes = join_processes(settings.device, settings.device_map)
    try:
        for model in settings.models:
            try:
                for mine in by_method(model, settings, suite):
                    yield _evaluate_model(
                        model, mine, suite, tasks, missing, sources, processes, progress
                    )
            except UserError as error:
                yield error if model in str(error) else UserError(f"{model}: {error}")
    finally:
        processes.close()


def by_method(
    model: str, settings: EvaluationSettings, suite: Suite
) -> Iterator[EvaluationSettings]:
    """Yield the settings of each run of a model: of minimal pairs one per method that it allows."""
    if not suite.is_of_pairs:
        yield settings
        return
    if settings.method != "rtd":
        yield replace(settings, method="decoder")
    if settings.method != "decoder":
        from metro.models.pretraining_model import load_rtd_head

        if load_rtd_head(model) is not None:
            name = settings.run_name
            if settings.method is None and name is not None:
                name = f"{name}-rtd"
            yield replace(settings, method="rtd", run_name=name)
        elif settings.method == "rtd":
            raise UserError(
                f"{model} has no head of replaced token detection: give the checkpoint (.pt) of "
                "METRO pretraining, or export it with `metro convert to-hf --keep-auxiliary`"
            )


def check_method(settings: EvaluationSettings, suite: Suite) -> None:
    """Refuse a method that is not one of the suite's kind."""
    methods = PAIR_METHODS if suite.is_of_pairs else METHODS
    if settings.method not in (None, *methods):
        raise UserError(
            f"method is {settings.method!r}; the methods of suite {suite.name} are "
            f"{', '.join(methods)}"
        )
    if suite.is_of_pairs and settings.normalization != "sum":
        raise UserError(
            f"normalization is {settings.normalization!r}; minimal pairs are scored by their sum"
        )


def without_rendering(settings: EvaluationSettings, progress: Progress) -> EvaluationSettings:
    """Reset the options that a prepared suite has no use for, and name those that were given."""
    unused: dict[str, Any] = {
        part.name: part.default for part in fields(settings) if part.name in RENDERING
    }
    given = [name for name, default in unused.items() if getattr(settings, name) != default]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        progress.say(f"warning: {flags} not used: these prompts are already prepared")
    return replace(settings, **unused)


def check_models(settings: EvaluationSettings, suite: Suite) -> None:
    """Refuse models that do not exist, or have no published numbers to check."""
    from metro.evaluation.runs.published import published_values
    from metro.models.registry import registered_model
    from metro.models.source import model_source

    for name in settings.models:
        model_source(name)
        if settings.check_published:
            registered = registered_model(name)
            published_values(registered, suite.name, settings.method_of(name))


def check_own_choices(tasks: "list[Task]", scored: "ScoredModel") -> None:
    """Refuse answer choices of own rows that are the same to the model.

    Raises:
        UserError: two have equal tokens.
    """
    from metro.data.jsonl_rows import UnusableRow
    from metro.evaluation.scoring.rank_classification import check_distinct

    encoder = scored.protocol.encoder(scored.tokenizer)
    for task in tasks:
        for prompt in task.prompts:
            for number in task.rows(prompt):
                with suppress(UnusableRow):
                    choices = [*task.example(prompt, number, flipped=False).choices]
                    check_distinct(encoder.targets(choices), choices)
                    break


def _evaluate_model(
    name: str,
    settings: EvaluationSettings,
    suite: Suite,
    tasks: "list[Task]",
    missing: dict[str, str],
    sources: "Sources",
    processes: "Processes",
    progress: Progress,
) -> Evaluation:
    """Evaluate a model in its run folder, which no other process writes meanwhile."""
    from metro.evaluation.model import open_model
    from metro.evaluation.runs import runner
    from metro.evaluation.runs.published import check_published
    from metro.evaluation.runs.run_folder import RunFolder, read_run, refuse_another_model
    from metro.evaluation.runs.summary import summarize, write_summary
    from metro.evaluation.scoring.minimal_pairs import question_of
    from metro.models.pretraining_model import load_rtd_head
    from metro.utils.identity import weights_identity

    path = settings.out / settings.folder_name(name, suite.name)
    with ExitStack() as lock:
        processes.on_first(lambda: lock.enter_context(locked(path)))
        if not settings.overwrite:
            processes.on_first(lambda: refuse_another_model(path, name))
        progress.say(f"loading {name}")
        scored = open_model(name, settings, processes.device)
        if settings.data is not None:
            check_own_choices(tasks, scored)
        model, method, registered = scored.model, scored.method, scored.registered
        rtd_head = load_rtd_head(name) if method == "rtd" else None
        question = question_of(model, scored.tokenizer) if method == "decoder" else None
        scoring = runner.Scoring(method, settings.normalization, scored.batch_tokens, question)

        def open_folder() -> RunFolder:
            content = dict(scored.identity)
            if rtd_head is not None:
                content["rtd_head"] = weights_identity(rtd_head)
            info = runner.run_info(
                name,
                registered.name if registered else None,
                content,
                scored.dtype,
                suite,
                tasks,
                sources,
                scored.protocol,
                scoring,
            )
            if settings.overwrite and (path / "run.json").is_file():
                shutil.rmtree(path)
            return RunFolder(path, info)

        folder = processes.on_first(open_folder)
        asked = f" ({scoring.question})" if scoring.question else ""
        progress.say(f"{name} on {suite.title}, into {path}")
        progress.say(f"{scored.describe()}{asked}")
        num_new, left_out = runner.evaluate_prompts(
            model,
            scored.tokenizer,
            tasks,
            folder,
            suite.name,
            scored.protocol,
            scoring,
            processes,
            progress,
            rtd_head,
        )
        if left_out and not processes.from_first(lambda: bool(folder and folder.results)):
            raise UserError(f"no prompt can be evaluated: {next(iter(left_out.values()))}")
        summary = processes.from_first(lambda: summarize(read_run(path)))
        if folder is not None:
            write_summary(summary, path / "summary.json")
    if num_new == 0 and not left_out:
        progress.say("all prompts were finished before; nothing was computed")
    published = None
    if settings.check_published and registered:
        published = check_published(summary, registered, settings.tolerance)
    return Evaluation(path, summary, {**missing, **left_out}, num_new, published)
