"""Run folders: what an evaluation leaves on disk, and how it is read back.

    OUT/<run name>/
      run.json        {"model", "method", "suite", "title": of the suite, "registered": name or
                       null, "weights": digest, "protocol": {...}, "options": {...},
                       "suite_content": digest, "sources": {folders}, "versions": {...},
                       "tasks": {task: [prompt, ...]}}
      results.jsonl   one object per finished (task, prompt), written when it is finished
      scores/<task>/<prompt>.jsonl   one object per example:
                      {"index", "scores", "prediction", "label"}

"tasks" of run.json is what the suite lists, in its order, whatever the run was narrowed to: by it
a reader sees which tasks are partial. A run without it counts as listing what it has.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from metro.utils.messages import UserError


class ExampleScore(NamedTuple):
    """One example of one prompt."""

    index: int
    """Which example of the dataset: prompts of a task are compared by it."""
    prediction: int
    label: int


@dataclass(frozen=True)
class PromptResult:
    """One finished (task, prompt), a line of results.jsonl."""

    suite: str
    task: str
    prompt: str
    method: str
    num_examples: int
    accuracy: float
    """As a fraction, like the two below."""
    macro_f1: float | None = None
    chance: float | None = None
    median_choices: float | None = None
    seconds: float | None = None
    scores_file: str | None = None
    """Relative to the run folder."""


@dataclass
class Run:
    """One run folder."""

    folder: Path
    model: str
    method: str
    suite: str
    registered: str | None = None
    """Name in the registry of released models, None for another model."""
    title: str | None = None
    """Of the suite."""
    protocol: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, list[str]] = field(default_factory=dict)
    """Prompts of every task as the suite lists them."""
    results: list[PromptResult] = field(default_factory=list)

    def by_task(self) -> dict[str, list[PromptResult]]:
        """Results of every task that has any, tasks and prompts in the order of the suite."""
        found: dict[str, list[PromptResult]] = {task: [] for task in self.tasks}
        for result in self.results:
            found.setdefault(result.task, []).append(result)
        for task, results in found.items():
            place = {prompt: number for number, prompt in enumerate(self.tasks.get(task, []))}
            results.sort(key=lambda result, place=place: place.get(result.prompt, len(place)))
        return {task: results for task, results in found.items() if results}

    def scores(self, result: PromptResult) -> list[ExampleScore] | None:
        """The examples that have a label, None where the side file is not there (any more)."""
        path = self.folder / result.scores_file if result.scores_file else None
        if path is None or not path.is_file():
            return None
        scores = []
        for number, line in read_lines(path):
            try:
                label = line["label"]
                if label is not None:
                    scores.append(ExampleScore(line["index"], line["prediction"], label))
            except KeyError as error:
                raise UserError(
                    f"{path}, line {number}: no {error}; delete the file and evaluate again"
                ) from None
        return scores


def read_run(folder: str | Path) -> Run:
    """Read a run folder, finished or not."""
    folder = Path(folder)
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no run.json; give folders that "
                         "`metro evaluate` wrote")  # fmt: skip
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        required = {name: info[name] for name in ("model", "method", "suite")}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is corrupt ({error!r}); evaluate again into a new folder"
        ) from None
    optional = {name: info.get(name) or {} for name in ("protocol", "options", "versions", "tasks")}
    texts = {name: info.get(name) for name in ("registered", "title")}
    run = Run(folder, **required, **texts, **optional)
    run.results = list(read_results(folder / "results.jsonl"))
    for result in run.results:
        if (result.suite, result.method) != (run.suite, run.method):
            raise UserError(
                f"{folder}: run.json says suite {run.suite}, method {run.method}, but "
                f"{result.task} / {result.prompt} is of {result.suite}, {result.method}; "
                "evaluate again into a new folder"
            )
    return run


def read_results(path: Path) -> Iterator[PromptResult]:
    """The lines of a results.jsonl; none if the file is not there yet."""
    if not path.is_file():
        return
    names = {item.name for item in fields(PromptResult)}
    seen: dict[tuple[str, str], int] = {}
    for number, line in read_lines(path):
        try:
            result = PromptResult(**{name: line[name] for name in names if name in line})
            valid = 0 <= result.accuracy <= 1 and result.num_examples >= 0
        except TypeError as error:
            raise UserError(f"{path}, line {number}: {error}; delete the line and evaluate "
                             "again") from None  # fmt: skip
        if not valid:
            raise UserError(
                f"{path}, line {number}: accuracy {result.accuracy} of {result.num_examples} "
                "examples is no fraction; delete the line and evaluate again"
            )
        key = (result.task, result.prompt)
        if key in seen:
            raise UserError(
                f"{path}, line {number}: {result.task} / {result.prompt} is there twice, first in "
                f"line {seen[key]}; delete one of them"
            )
        seen[key] = number
        yield result


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line of a jsonl file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is corrupt ({error.msg}); delete the line "
                                 "and evaluate again") from None  # fmt: skip
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number} is no JSON object: {line[:60]}")
            yield number, value
