"""Evaluation of a model on a suite: each prompt of each task is written when it is finished."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.examples import VALUE_CUT
from metro.evaluation.runs.run_folder import RUN_FORMAT, PromptResult, RunFolder
from metro.evaluation.scoring.metrics import first_equal, measure, true_choice
from metro.evaluation.scoring.minimal_pairs import PairRanker, RtdScorer, measure_pairs
from metro.evaluation.scoring.pair_scoring import NotFinite, PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier, Ranking
from metro.evaluation.settings import PAIR_METHODS
from metro.evaluation.tasks.protocol import Protocol
from metro.evaluation.tasks.suites import Suite
from metro.evaluation.tasks.task import Examples, Sources, Task
from metro.processes import Processes
from metro.utils.messages import UserError, counted, percent
from metro.utils.progress import SILENT, Progress

SCORE_DIGITS = 6


@dataclass(frozen=True)
class Scoring:
    """Scoring of a suite; method and normalization are recorded."""

    method: str = "direct"
    """``direct``, ``channel`` or ``flipped``; of minimal pairs ``decoder`` or ``rtd``."""
    normalization: str = "sum"
    """``sum``, ``mean`` or ``calibrated``."""
    batch_tokens: int = 4096
    """Tokens of a batch; changes speed, not results."""
    question: str | None = None
    """What the decoder is asked about minimal pairs; decided by the model's pretraining."""


def run_info(
    model_name: str,
    registered: str | None,
    content: dict[str, str],
    dtype: str,
    suite: Suite,
    tasks: Sequence[Task],
    sources: Sources,
    protocol: Protocol,
    scoring: Scoring,
) -> dict[str, Any]:
    """Content of ``run.json``: everything that the numbers depend on.

    Args:
        model_name: as the user gave it.
        registered: its name in the registry, if it has one.
        content: of :func:`metro.utils.identity.model_identity`.
        dtype: of the weights.
        suite: the whole suite, also where the run is narrowed to a part of it.
        tasks: with their data, those that the run is narrowed to.
    """
    return {
        "format": RUN_FORMAT,
        "model": model_name,
        "registered": registered,
        "place": str(Path(model_name).resolve()) if Path(model_name).exists() else None,
        "content": content,
        "method": scoring.method,
        "question": scoring.question,
        "suite": suite.name,
        "title": suite.title,
        "protocol": protocol.as_dict(),
        "options": {
            "normalization": scoring.normalization,
            "split": sources.split,
            "limit": sources.limit,
            "instruction_text": sources.instruction_text,
            "label_words": sources.label_words,
            "seed": sources.seed,
            "dtype": dtype,
        },
        "data": {task.name: {p: task.content(p) for p in task.prompts} for task in tasks},
        "sources": {
            name: str(Path(folder).resolve()) if folder is not None else None
            for name, folder in (
                ("data_dir", sources.data_dir),
                ("templates", sources.templates),
                ("bigbench_dir", sources.bigbench_dir),
            )
        },
        "versions": environment_versions(),
        "tasks": {name: list(spec.prompts) for name, spec in suite.tasks.items()},
    }


def evaluate_prompts(
    model,
    tokenizer,
    tasks: Sequence[Task],
    folder: RunFolder | None,
    suite_name: str,
    protocol: Protocol,
    scoring: Scoring,
    processes: Processes,
    progress: Progress = SILENT,
    rtd_head: torch.nn.Module | None = None,
) -> tuple[int, dict[str, str]]:
    """Evaluate the prompts that are not finished yet, and write each one.

    A prompt that cannot be evaluated is left out, and named.

    Args:
        model: any sequence-to-sequence model of Hugging Face, in eval mode.
        tokenizer: of the model.
        tasks: with their data, see :func:`metro.evaluation.tasks.loading.load_tasks`.
        folder: of the first process; the others have None.
        suite_name: for the results.
        protocol: special tokens and lengths of the model's inputs.
        scoring: method, normalization, size of batches.
        processes: share the batches; the results equal those of one process.
        progress: shows the work, each result, and remarks on rows.
        rtd_head: the head that scores, of method ``rtd``.

    Returns:
        Number of prompts evaluated in this call, and those left out ("task / prompt" -> reason);
        the others were finished before.

    Raises:
        NotFinite: a score is NaN or infinite; the message names the prompt.
    """
    units = [(task, prompt) for task in tasks for prompt in task.prompts]
    done = processes.from_first(
        lambda: [folder is not None and folder.is_done(task.name, prompt) for task, prompt in units]
    )
    weights = [task.weight(prompt) for task, prompt in units]
    total = sum(weights)
    position = sum(weight for weight, is_done in zip(weights, done, strict=True) if is_done)
    scorer = PairScorer(
        model,
        batch_tokens=scoring.batch_tokens,
        rank=processes.rank,
        num_processes=processes.count,
        gather=processes.add_up if processes.count > 1 else None,
    )
    classifier: RankClassifier | PairRanker
    current = None
    left_out: dict[str, str] = {}
    for (task, prompt), weight, is_done in zip(units, weights, done, strict=True):
        if is_done:
            continue
        if current is not task:
            current = task
            scorer.forget()
        name = f"{task.name} / {prompt}"

        def show(share: float, name=name, weight=weight, before=position):
            progress.show("evaluation", before + weight * share, total, name)

        show(0.0)
        started = time.perf_counter()
        try:
            flipped = scoring.method == "flipped"
            asked = task.examples(prompt, flipped=flipped, prepare=protocol.prepare)
            encoder = protocol.encoder(tokenizer, task.name)
            if rtd_head is not None:
                rtd_scorer = RtdScorer(model, rtd_head, scoring.batch_tokens)
                classifier = PairRanker(rtd_scorer, encoder, "rtd", model.config)
            elif scoring.question:
                classifier = PairRanker(scorer, encoder, scoring.question, model.config)
            else:
                classifier = RankClassifier(scorer, encoder, scoring.method, scoring.normalization)
            rankings = classifier.rank(asked.examples, progress=show)
        except NotFinite as error:
            raise NotFinite(error.score, f"an answer choice of {name}") from None
        except UserError as error:
            left_out[name] = str(error)
            progress.say(f"{name}: left out: {error}")
            continue
        finally:
            show(1.0)
            position += weight
        for text in describe_rows(asked, classifier, rankings):
            progress.say(f"{name}: {text}")
        if folder is not None:
            seconds = time.perf_counter() - started
            result = write_prompt(
                folder, suite_name, task, prompt, scoring, asked, encoder, rankings, seconds
            )
            progress.say(
                f"{name}: {percent(result.accuracy)} % of {result.num_examples}, {seconds:.1f} s"
            )
    return len(done) - sum(done) - len(left_out), left_out


def describe_rows(
    asked: Examples, classifier: RankClassifier | PairRanker, rankings: Sequence[Ranking]
) -> list[str]:
    """Remarks on the rows of a prompt that were left out or changed."""
    num_rows = len(asked.examples) + sum(each.num_rows for each in asked.skipped.values())
    found = [
        f"{each.num_rows} of {counted(num_rows, 'row')} left out: {why} (first: {each.first})"
        for why, each in asked.skipped.items()
    ]
    if cut := sum(example.is_cut for example in asked.examples):
        found.append(f"{counted(cut, 'row')} with a {VALUE_CUT}")
    target = "answer choice" if classifier.method == "direct" else "target"
    found += classifier.encoder.describe_cuts(target)
    if isinstance(classifier, PairRanker):
        ties = sum(ranking.prediction is None for ranking in rankings)
        return found + (
            [f"{counted(ties, 'pair')} with equal scores: each counts half"] * bool(ties)
        )
    duplicates = sum(e.num_distinct_choices < len(e.choices) for e in asked.examples)
    if duplicates:
        found.append(
            f"{counted(duplicates, 'row')} with duplicate answer choices; duplicates count as one "
            "choice"
        )
    if classifier.num_indistinct:
        found.append(
            f"{counted(classifier.num_indistinct, 'row')} with different answer choices of equal "
            "tokens; the first of them wins"
        )
    return found


def write_prompt(
    folder: RunFolder,
    suite_name: str,
    task: Task,
    prompt: str,
    scoring: Scoring,
    asked: Examples,
    encoder: PromptEncoder,
    rankings: Sequence[Ranking],
    seconds: float,
) -> PromptResult:
    """Write a finished prompt into the run folder."""
    predictions = [
        None if ranking.prediction is None else first_equal(example, ranking.prediction)
        for example, ranking in zip(asked.examples, rankings, strict=True)
    ]
    if scoring.method in PAIR_METHODS:
        metrics = measure_pairs(predictions)
    else:
        metrics = measure(asked.examples, [p for p in predictions if p is not None])
    result = PromptResult(
        suite=suite_name,
        task=task.name,
        prompt=prompt,
        method=scoring.method,
        num_examples=len(asked.examples),
        seconds=round(seconds, 3),
        **metrics._asdict(),
    )
    scores = (
        {
            "index": example.index,
            "scores": [round(score, SCORE_DIGITS) for score in ranking.scores],
            "prediction": prediction,
            "label": true_choice(example),
        }
        for example, ranking, prediction in zip(asked.examples, rankings, predictions, strict=True)
    )
    counts = {
        "skipped": sum(left_out.num_rows for left_out in asked.skipped.values()),
        "cut_sources": encoder.num_cut_sources,
        "cut_targets": encoder.num_cut_targets,
    }
    return folder.write(result, scores, counts)


def environment_versions() -> dict[str, str]:
    """Versions and device, which a number may depend on besides the model."""
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
