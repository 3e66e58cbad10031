"""Evaluates a model on a suite: every prompt of every task, each written when it is finished."""

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.runs.processes import Processes
from metro.evaluation.runs.results import PromptResult
from metro.evaluation.runs.run_folder import RunFolder
from metro.evaluation.scoring.metrics import first_alike, measure
from metro.evaluation.scoring.pair_scoring import PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier, Ranking
from metro.evaluation.tasks.kinds import Examples, Sources, Task
from metro.evaluation.tasks.protocol import Protocol
from metro.evaluation.tasks.suites import Suite
from metro.utils.messages import counted

SCORE_DIGITS = 6


@dataclass(frozen=True)
class Settings:
    """How a suite is run; all of it is recorded."""

    method: str = "direct"
    normalization: str = "sum"
    batch_tokens: int = 4096
    """Tokens of a batch; changes speed, not results."""


@dataclass
class Outcome:
    """What happened."""

    notes: list[str] = field(default_factory=list)
    num_new: int = 0
    """Prompts evaluated now, not found finished."""


class Listener:
    """Is told how the evaluation goes on; this one keeps silent."""

    def start(self, total: float, done: float) -> AbstractContextManager:
        """All work and what was found finished, in units of weight."""
        return nullcontext()

    def advance(self, task: str, prompt: str, done: float) -> None:
        """Work done since ``start``, all in all."""

    def finished(self, result: PromptResult) -> None:
        """A prompt is written."""

    def note(self, text: str) -> None:
        """Something a user should read."""


def run_info(
    model_name: str,
    registered: str | None,
    model,
    suite: Suite,
    sources: Sources,
    protocol: Protocol,
    settings: Settings,
    versions: dict[str, str],
) -> dict[str, Any]:
    """``run.json``: what the numbers depend on. ``suite`` is the whole suite.

    Of the weights and the suite's tasks a digest is kept, of rows and templates the folders.
    """
    return {
        "model": model_name,
        "registered": registered,
        "weights": fingerprint(model),
        "method": settings.method,
        "suite": suite.name,
        "title": suite.title,
        "protocol": protocol.as_dict(),
        "options": {
            "normalization": settings.normalization,
            "split": sources.split,
            "limit": sources.limit,
            "instruction_text": sources.instruction_text,
            "label_words": sources.label_words,
            "seed": sources.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "suite_content": suite.fingerprint(),
        "sources": {
            name: str(Path(folder).resolve()) if folder is not None else None
            for name, folder in (
                ("data_dir", sources.data_dir),
                ("templates", sources.templates),
                ("bigbench_dir", sources.bigbench_dir),
            )
        },
        "versions": versions,
        "tasks": {name: list(spec.prompts) for name, spec in suite.tasks.items()},
    }


def fingerprint(model) -> str:
    """Of the weights: a few numbers of every tensor, so that another model is told apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // 16)][:16].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[Task],
    folder: RunFolder | None,
    suite_name: str,
    protocol: Protocol,
    settings: Settings,
    processes: Processes,
    listener: Listener | None = None,
) -> Outcome:
    """Evaluate the prompts that are not finished yet, and write each when it is.

    Args:
        tasks: with their data, see :func:`metro.evaluation.tasks.kinds.load_tasks`.
        folder: of the first process; the others have None.
        processes: share the batches; the results are those of one process.
    """
    listener = listener or Listener()
    outcome = Outcome()
    units = [(task, prompt) for task in tasks for prompt in task.prompts]
    done = [folder.is_done(task.name, prompt) for task, prompt in units] if folder else None
    done = processes.from_first(done)
    weights = [task.weight(prompt) for task, prompt in units]
    found = sum(weight for weight, is_done in zip(weights, done, strict=True) if is_done)
    scorer = PairScorer(
        model,
        batch_tokens=settings.batch_tokens,
        rank=processes.rank,
        num_processes=processes.count,
        gather=processes.add_up if processes.count > 1 else None,
    )
    position, current = 0.0, None
    with listener.start(sum(weights), found):
        for (task, prompt), weight, is_done in zip(units, weights, done, strict=True):
            if is_done:
                continue
            if current is not task:
                current = task
                scorer.forget()

            def progress(share: float, task=task, prompt=prompt, weight=weight, before=position):
                listener.advance(task.name, prompt, before + weight * share)

            progress(0.0)
            started = time.perf_counter()
            asked = task.examples(prompt, flipped=settings.method == "flipped")
            asked.examples = [protocol.prepare(example) for example in asked.examples]
            classifier = make_classifier(scorer, tokenizer, protocol, settings, task.name)
            rankings = classifier.rank(asked.examples, progress=progress)
            position += weight
            listener.advance(task.name, prompt, position)
            for note in describe_skipped(task, prompt, asked, classifier):
                outcome.notes.append(note)
                listener.note(note)
            if folder is not None:
                seconds = time.perf_counter() - started
                result = write_prompt(
                    folder, suite_name, task, prompt, settings, asked, rankings, seconds
                )
                listener.finished(result)
            outcome.num_new += 1
    return outcome


def make_classifier(
    scorer: PairScorer, tokenizer, protocol: Protocol, settings: Settings, task: str
) -> RankClassifier:
    source_length, target_length = protocol.lengths(task)
    encoder = PromptEncoder(
        tokenizer,
        source_special_tokens=protocol.source_special_tokens,
        max_source_length=source_length,
        max_target_length=target_length,
    )
    return RankClassifier(scorer, encoder, settings.method, settings.normalization)


def describe_skipped(
    task: Task, prompt: str, asked: Examples, classifier: RankClassifier
) -> list[str]:
    """What a user should know about the rows of a prompt."""
    where = f"{task.name} / {prompt}"
    found = [
        f"{where}: {counted(count, 'row')} left out: {why}" for why, count in asked.skipped.items()
    ]
    alike = sum(e.num_distinct_choices < len(e.choices) for e in asked.examples)
    if alike:
        found.append(
            f"{where}: options that read alike in {counted(alike, 'row')}: they count as one"
        )
    if classifier.num_alike:
        found.append(
            f"{where}: options that are the same tokens to the model in "
            f"{counted(classifier.num_alike, 'row')}: the first of them wins"
        )
    cut = classifier.encoder.num_cut_targets
    if cut:
        what = "option" if classifier.method == "direct" else "target"
        found.append(
            f"{where}: {counted(cut, what)} cut at {classifier.encoder.max_target_length} tokens; "
            "--max-target-length changes it"
        )
    return found


def write_prompt(
    folder: RunFolder,
    suite_name: str,
    task: Task,
    prompt: str,
    settings: Settings,
    asked: Examples,
    rankings: Sequence[Ranking],
    seconds: float,
) -> PromptResult:
    """Enter a finished prompt into the run folder."""
    metrics = measure(asked.examples, [ranking.prediction for ranking in rankings])
    result = PromptResult(
        suite=suite_name,
        task=task.name,
        prompt=prompt,
        method=settings.method,
        num_examples=len(asked.examples),
        seconds=round(seconds, 3),
        scores_file=folder.scores_file(task.name, prompt),
        **metrics._asdict(),
    )
    scores = (
        {
            "index": example.index,
            "scores": [round(score, SCORE_DIGITS) for score in ranking.scores],
            "prediction": first_alike(example, ranking.prediction),
            "label": first_alike(example, example.label),
        }
        for example, ranking in zip(asked.examples, rankings, strict=True)
    )
    folder.write(result, scores, {"skipped": sum(asked.skipped.values())})
    return result


def environment_versions() -> dict[str, str]:
    """What a number may depend on besides the model."""
    import platform

    import transformers

    import metro

    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "metro": metro.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }
