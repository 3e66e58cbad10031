"""Run folders: the files that an evaluation writes, and how they are read back.

    OUT/<run name>/
      run.json        {"format": RUN_FORMAT, "model", "method", "suite",
                       "question": of the decoder, for minimal pairs, or null,
                       "title": of the suite, "registered": name or null, "place": of the model,
                       "content": digests {weights, configuration, tokenizer}, "protocol": {...},
                       "options": {...}, "data": {task: {prompt: digest of its rows and template}},
                       "sources": {folders}, "versions": {...}, "tasks": {task: [prompt, ...]}}
      results.jsonl   one object per finished (task, prompt), written when it is finished
      scores/<task>/<prompt>.jsonl   one object per example:
                      {"index", "scores", "prediction", "label"}

``run.json`` and each line of ``results.jsonl`` end with the checksum of their content, ``crc32``.

"tasks" of run.json lists the whole suite in its order, whatever the run was narrowed to, so that a
reader sees which tasks are partial. A run without it counts as listing the prompts that it has.

What the numbers depend on is compared by content, as digests: a model or data that lie elsewhere
now resume the run, others under the same names do not. ``run.json`` comes with the first result.

The scores of a prompt are complete in their file before its line enters ``results.jsonl``, and both
files appear by renaming: an interrupted prompt leaves no trace and is evaluated again.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from os.path import samefile
from pathlib import Path
from typing import Any

from metro.utils.checksums import facts
from metro.utils.files import file_name, read_json, sealed, unsealed, write_json, write_text
from metro.utils.messages import UserError

RUN_FORMAT = 3
"""Raised when the same settings give other examples or scores. 2: templates that draw at random
have other seeds, and rows that lack a field of the template are left out. 3: digests of all rows
and templates; rows without a label or with a single distinct answer choice are left out."""
IDENTITY = "method suite protocol options content".split()
"""Keys of run.json that must be equal to resume a run; the model's content last, as another dtype
changes its weights too. Versions may differ."""

REMEDY = "give another --run-name, or --overwrite"


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """Prediction for one example of one prompt."""

    index: int
    """Row of the dataset: prompts of a task are compared by it."""
    prediction: int | None
    """None: a tie that counts half."""
    label: int

    @property
    def right(self) -> float:
        return 0.5 if self.prediction is None else float(self.prediction == self.label)


@dataclass(frozen=True)
class PromptResult:
    """Metrics of one finished (task, prompt), a line of results.jsonl."""

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
    scores_crc32: str | None = None
    """Checksum of that file."""


@dataclass
class Run:
    """Contents of a run folder."""

    folder: Path
    model: str
    method: str
    suite: str
    registered: str | None = None
    """Name in the registry of released models, None for another model."""
    question: str | None = None
    """What the decoder was asked, of minimal pairs."""
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
        listed = [(task, prompt) for task, prompts in self.tasks.items() for prompt in prompts]
        order = {key: number for number, key in enumerate(listed)}
        found: dict[str, list[PromptResult]] = {task: [] for task in self.tasks}
        for result in sorted(
            self.results, key=lambda each: order.get((each.task, each.prompt), len(order))
        ):
            found.setdefault(result.task, []).append(result)
        return {task: results for task, results in found.items() if results}

    def scores(self, result: PromptResult) -> list[ExampleScore] | None:
        """Scores of the examples that have a label, None where the score file is missing."""
        if result.scores_file is None or not (self.folder / result.scores_file).is_file():
            return None
        path = self.folder / result.scores_file
        if result.scores_crc32 not in (None, facts(path)["crc32"]):
            raise UserError(
                f"{path} was damaged or changed since it was written: evaluate again into a new "
                "folder, or copy it again"
            )
        scores = []
        for number, line in read_json_lines(path):
            try:
                if line["label"] is not None:
                    scores.append(ExampleScore(line["index"], line["prediction"], line["label"]))
            except KeyError as error:
                raise UserError(
                    f"{path}, line {number}: no {error}; delete the file and evaluate again"
                ) from None
        return scores


def check_run(folder: Path) -> None:
    """Read everything in a run folder, with its checksums.

    Raises:
        UserError: a file is damaged.
    """
    run = read_run(folder)
    for result in run.results:
        run.scores(result)


def read_run(folder: str | Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        UserError: ``folder`` is not a run folder, or a file in it is corrupt.
    """
    folder = Path(folder)
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no run.json; give folders that `metro "
            "evaluate` wrote"
        )
    try:
        info = read_json(path)
        run = Run(folder, info["model"], info["method"], info["suite"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is corrupt ({error!r}); evaluate again into a new folder"
        ) from None
    for name in ("registered", "question", "title", "protocol", "options", "versions", "tasks"):
        setattr(run, name, info.get(name) or getattr(run, name))
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
    """Yield the lines of a results.jsonl; none if the file does not exist yet."""
    if not path.is_file():
        return
    names = {item.name for item in fields(PromptResult)}
    seen: dict[tuple[str, str], int] = {}
    for number, line in read_json_lines(path):
        try:
            result = PromptResult(**{name: line[name] for name in names if name in line})
            valid = 0 <= result.accuracy <= 1 and result.num_examples >= 0
        except TypeError as error:
            raise UserError(
                f"{path}, line {number}: {error}; delete the line and evaluate again"
            ) from None
        if not valid:
            raise UserError(
                f"{path}, line {number}: accuracy {result.accuracy} of {result.num_examples} "
                "examples is not a fraction; delete the line and evaluate again"
            )
        key = (result.task, result.prompt)
        if key in seen:
            raise UserError(
                f"{path}, line {number}: {result.task} / {result.prompt} is there twice, first in "
                f"line {seen[key]}; delete one of them"
            )
        seen[key] = number
        yield result


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and object of every line of a jsonl file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is corrupt ({error}); delete the line and evaluate again"
        ) from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number} is corrupt ({error.msg}); delete the line and "
                    "evaluate again"
                ) from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number} is not a JSON object: {line[:60]}")
            yield number, unsealed(value, f"{path}, line {number}")


def refuse_another_model(folder: Path, model: str) -> None:
    """Refuse, before it is loaded, a model that lies beside the one of a run.

    Raises:
        UserError: ``folder`` holds a run of a model that is still at another place.
    """
    info = read_json(folder / "run.json")
    place = info.get("place") if isinstance(info, dict) else None
    if place and Path(place).exists() and not (Path(model).exists() and samefile(place, model)):
        raise UserError(
            f"{folder} holds a run of the model {place}, and {model} is another one; {REMEDY}"
        )


class RunFolder:
    """A run folder to write into.

    Args:
        folder: created if it does not exist; a folder of the same run is resumed.
        info: content of ``run.json``.

    Raises:
        UserError: the folder holds another run, or other files.
    """

    def __init__(self, folder: Path, info: dict[str, Any]):
        self.folder, self.info = Path(folder), json.loads(json.dumps(info))
        path = self.folder / "run.json"
        self.results = list(read_results(self.folder / "results.jsonl"))
        if path.is_file():
            before = self._check_same(path)
            for task, digests in before.get("data", {}).items():
                self.info["data"][task] = {**digests, **self.info["data"].get(task, {})}
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} is not empty and has no run.json: it is not a run; choose another "
                "folder with --out or --run-name"
            )
        for left in self.folder.rglob("*.tmp"):  # of a process that was killed
            left.unlink()

    def _check_same(self, path: Path) -> dict[str, Any]:
        """Refuse to mix the results of two runs; return what ``run.json`` holds."""
        before = read_json(path)
        if not isinstance(before, dict):
            raise UserError(f"{path} is corrupt; delete {self.folder} and start again")
        now = self.info
        if (format := before.get("format", 1)) != RUN_FORMAT:
            which = "an earlier" if format < RUN_FORMAT else "another"
            raise UserError(
                f"{self.folder} was evaluated by {which} version of METRO that makes other "
                f"examples of the same rows; {REMEDY}"
            )
        for name in IDENTITY:
            old, new = before.get(name), now[name]
            if old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
                if name == "content":
                    raise UserError(
                        f"{self.folder} holds a run of other {key} of {before['model']}: it was "
                        f"trained on or replaced since, or {now['model']} is another model; "
                        f"{REMEDY}"
                    )
                name, old, new = f"{name}: {key}", old.get(key), new.get(key)
            raise UserError(
                f"{self.folder} holds a run with {name} {old!r}, this one has {new!r}; give "
                "the same options to resume it, another --run-name, or --overwrite"
            )
        for result in self.results:
            task, prompt = result.task, result.prompt
            if prompt not in now["tasks"].get(task, []):
                raise UserError(
                    f"{self.folder} holds results of task {task}, prompt {prompt!r}, which suite "
                    f"{now['suite']} does not have now; {REMEDY}"
                )
            digest = now["data"].get(task, {}).get(prompt)
            if digest is not None and before.get("data", {}).get(task, {}).get(prompt) != digest:
                raise UserError(
                    f"{self.folder} holds a run on other data of task {task}: its rows or the "
                    f"template of prompt {prompt!r} were changed or prepared again since; {REMEDY}"
                )
        return before

    def is_done(self, task: str, prompt: str) -> bool:
        """Tell finished prompts."""
        return any((r.task, r.prompt) == (task, prompt) for r in self.results)

    def write(
        self, result: PromptResult, scores: Iterable[dict[str, Any]], extra: dict[str, Any]
    ) -> PromptResult:
        """Add a finished prompt, and return it with the name of its score file.

        Args:
            result: its metrics.
            scores: one object per example.
            extra: further fields of its line.
        """
        name = f"scores/{file_name(result.task)}/{file_name(result.prompt)}.jsonl"
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "run.json", self.info, seal=True)
        lines = (json.dumps(score, allow_nan=False) + "\n" for score in scores)
        write_text(self.folder / name, "".join(lines))
        checksum = facts(self.folder / name)["crc32"]
        result = replace(result, scores_file=name, scores_crc32=checksum)
        listed = self.folder / "results.jsonl"
        before = listed.read_text(encoding="utf-8") if listed.is_file() else ""
        content = sealed({**asdict(result), **extra})
        line = json.dumps(content, ensure_ascii=False, allow_nan=False)
        write_text(listed, f"{before}{line}\n")
        self.results.append(result)
        return result
