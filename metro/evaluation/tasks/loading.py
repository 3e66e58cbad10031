"""Tasks with their data, one class for each kind of suite: rows become questions.

Rows of which no question can be made are left out, counted and named.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from metro.data.datasets import DatasetUnavailable, load_rows, name_of
from metro.data.jsonl_rows import UnusableRow
from metro.data.local_files import find_split, kind_of, open_rows, splits_in
from metro.data.prompts.examples import (
    ExampleSettings,
    LeftOut,
    check_choices,
    count_row,
    make_example,
)
from metro.data.prompts.instruction import NO_INSTRUCTION
from metro.data.prompts.stored import PromptedExamples, read_manifest
from metro.data.prompts.templates import PromptTemplate, TemplateTree, find_templates
from metro.evaluation.tasks import bigbench
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.label_generalization import replace_label_words
from metro.evaluation.tasks.suites import WHOLE_TASK, Suite, TaskSpec
from metro.utils.identity import digest
from metro.utils.messages import UserError, shortened

SUBTASK_STRIDE = 1_000_000
"""Row numbers of the subtasks of a BIG-bench task begin at multiples of this."""
MAX_ROWS_SEED = 42


@dataclass(frozen=True)
class Sources:
    """Places of the data, and the part of it that is used."""

    data_dir: Path | None = None
    templates: Path | None = None
    bigbench_dir: Path | None = None
    split: str | None = None
    """Used instead of the suite's."""
    limit: int | None = None
    """Rows per task, spread evenly over the split."""
    instruction_text: str = "published"
    label_words: str = "words"
    seed: int = 0
    """Of Jinja's random draws."""

    def __post_init__(self):
        for option, folder in (
            ("--data-dir", self.data_dir),
            ("--bigbench-dir", self.bigbench_dir),
        ):
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"{option} {folder} is not a folder")
        if self.templates is not None:
            find_templates(self.templates)  # now, as loading rows may take long

    @cached_property
    def tree(self) -> TemplateTree:
        return find_templates(self.templates)


@dataclass
class Examples:
    """The questions of one prompt."""

    examples: list[EvaluationExample] = field(default_factory=list)
    skipped: dict[str, LeftOut] = field(default_factory=dict)
    """Reason -> rows left out."""


class Task:
    """A task that can be evaluated; subclasses read its rows.

    Raises:
        DatasetUnavailable: its data are not available here.
    """

    def __init__(self, spec: TaskSpec, sources: Sources):
        self.spec, self.sources, self.name = spec, sources, spec.name
        self.prompts = list(spec.prompts)
        self.unavailable: dict[str, str] = {}
        """Parts of it without data -> reason; the others are evaluated."""

    def rows(self, prompt: str) -> Sequence[int]:
        """Return the numbers of the rows that are asked."""
        raise NotImplementedError

    def record(self, prompt: str, number: int) -> Any:
        """Return the content of a row, as JSON takes it."""
        raise NotImplementedError

    def recipe(self, prompt: str) -> Any:
        """Return what makes questions of rows: template, split, texts around; as JSON takes it."""
        return None

    def example(self, prompt: str, number: int, *, flipped: bool) -> EvaluationExample:
        """Make the question of a row.

        Raises:
            UnusableRow: there is none.
        """
        raise NotImplementedError

    def weight(self, prompt: str) -> float:
        """Estimate the work for the progress bar: characters of all rows."""
        rows, sizes = self.rows(prompt), []
        for number in rows[:: max(1, len(rows) // 20)]:
            with suppress(UnusableRow):
                sizes.append(len(str(self.record(prompt, number))))
        return len(rows) * (100 + sum(sizes) / max(1, len(sizes)))

    def content(self, prompt: str) -> str:
        """Digest of the rows that are asked and of the prompt's recipe: all that questions need."""
        return digest([self.recipe(prompt), self._content_of_rows(prompt)])

    def _content_of_rows(self, prompt: str) -> str:
        def content(number: int) -> Any:
            try:
                return [number, self.record(prompt, number)]
            except UnusableRow as error:
                return [number, str(error)]

        return digest(map(content, self.rows(prompt)))

    def examples(self, prompt: str, *, flipped: bool = False) -> Examples:
        """Make all questions of a prompt.

        Raises:
            UserError: there is none; the message says why.
        """
        found = Examples()
        for number in self.rows(prompt):
            try:
                found.examples.append(self.example(prompt, number, flipped=flipped))
            except UnusableRow as error:
                count_row(found.skipped, error, f"row {number}")
        if not found.examples:
            why = "it has no rows"
            if found.skipped:
                reason, left_out = max(found.skipped.items(), key=lambda item: item[1].num_rows)
                why = f"{reason} ({left_out.first})"
            raise UserError(f"task {self.name}, prompt {prompt!r}: no row can be evaluated: {why}")
        return found


class TemplateTask(Task):
    """Rows of a dataset asked with prompt templates."""

    def __init__(self, spec: TaskSpec, sources: Sources):
        super().__init__(spec, sources)
        self.split = ""
        if spec.data is not None:
            self.data: Sequence[dict] = own_rows(spec)
        else:
            self.split = sources.split or spec.split
            name = spec.dataset if sources.data_dir is not None else spec.hub or spec.dataset
            self.data = load_rows(name, spec.subset, self.split, data_dir=sources.data_dir)
        self.templates = {prompt: self.find_template(prompt) for prompt in self.prompts}
        self.indices = choose_rows(len(self.data), spec.max_rows, sources.limit)

    def find_template(self, prompt: str) -> PromptTemplate:
        spec = self.spec
        if prompt in spec.inline:
            texts = spec.inline[prompt]
            return PromptTemplate(
                spec.dataset, spec.subset, prompt, texts["jinja"], texts["answer_choices"]
            )
        dataset = spec.template.get("dataset", spec.dataset)
        subset = spec.template.get("subset", spec.subset)
        template = self.sources.tree.template(dataset, subset, prompt)
        if not template.answer_choices:
            raise UserError(
                f"template {prompt!r} of {template.dataset} has no answer choices: it cannot be "
                "evaluated by ranking them"
            )
        return template

    def row(self, number: int) -> dict:
        return self.data[number]

    def rows(self, prompt: str) -> Sequence[int]:
        return self.indices

    def record(self, prompt: str, number: int) -> Any:
        return self.row(number)

    def recipe(self, prompt: str) -> Any:
        template = self.templates[prompt]
        return [self.split, template.jinja, template.answer_choices, self.spec.replace_words]

    @cached_property
    def _content_of_all(self) -> str:
        return super()._content_of_rows("")

    def _content_of_rows(self, prompt: str) -> str:
        return self._content_of_all  # every prompt asks about the same rows

    def example(self, prompt: str, number: int, *, flipped: bool) -> EvaluationExample:
        template, row = self.templates[prompt], self.row(number)
        settings = ExampleSettings(
            self.sources.seed,
            self.sources.instruction_text,
            min_choices=1,
            with_instruction=flipped,
        )
        example = make_example(template, row, self.split, number, settings)
        question = EvaluationExample.of(example)
        if self.spec.replace_words:
            words = self.spec.replace_words
            question = replace_label_words(question, words, self.sources.label_words)
        return question


class MmluTask(TemplateTask):
    """A subject of MMLU in the form of ARC: answer choices A to D."""

    def row(self, number: int) -> dict:
        row = self.data[number]
        if "choices" not in row and all(letter in row for letter in "ABCD"):  # MMLU's own csv
            row = {**row, "choices": [row[letter] for letter in "ABCD"]}
        for name in ("question", "choices", "answer"):
            if name not in row:
                place = getattr(self.data, "path", f"subject {self.name}")
                raise UserError(f"{place}: row {number} has no {name!r}: it is not a row of MMLU")
        letters = [chr(ord("A") + number) for number in range(len(row["choices"]))]
        answer = row["answer"]
        return {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": letters},
            "answerKey": letters[answer] if isinstance(answer, int) else answer,
        }


class BigBenchTask(Task):
    """The ``task.json`` files of a BIG-bench task; its subtasks are its prompts."""

    def __init__(self, spec: TaskSpec, sources: Sources):
        super().__init__(spec, sources)
        root = sources.bigbench_dir
        if root is None and sources.data_dir is not None:
            root = Path(sources.data_dir) / "bigbench"
        if root is None:
            raise DatasetUnavailable(
                f"task {spec.name}: BIG-bench's task.json files come with its repository; give "
                "the folder benchmark_tasks with --bigbench-dir DIR"
            )
        self.files = {
            prompt: bigbench.read_task_file(
                Path(root) / spec.name / ("" if prompt == WHOLE_TASK else prompt)
            )
            for prompt in self.prompts
        }

    def rows(self, prompt: str) -> Sequence[int]:
        return choose_rows(len(self.files[prompt].examples), None, self.sources.limit)

    def record(self, prompt: str, number: int) -> Any:
        return self.files[prompt].examples[number]

    def recipe(self, prompt: str) -> Any:
        return self.files[prompt]._replace(examples=[])

    def example(self, prompt: str, number: int, *, flipped: bool) -> EvaluationExample:
        first = self.prompts.index(prompt) * SUBTASK_STRIDE
        return bigbench.make_question(self.files[prompt], number, first + number, flipped=flipped)


class MinimalPairsTask(Task):
    """Pairs of sentences, the better one first; its prompts are the paradigms of a phenomenon."""

    def __init__(self, spec: TaskSpec, sources: Sources):
        super().__init__(spec, sources)
        self.data: dict[str, Sequence[dict]] = {}
        for paradigm in spec.prompts:
            try:
                self.data[paradigm] = self.open(paradigm)
            except DatasetUnavailable as error:
                self.unavailable[f"{spec.name} / {paradigm}"] = str(error)
        if not self.data:
            raise DatasetUnavailable(next(iter(self.unavailable.values())))
        self.prompts = list(self.data)

    def open(self, paradigm: str) -> Sequence[dict]:
        spec, folder = self.spec, self.sources.data_dir
        if folder is None:
            name = spec.hub or spec.dataset
        elif (file := Path(folder) / spec.dataset / f"{paradigm}.jsonl").is_file():
            return JsonlRows(file)
        else:
            name = spec.dataset
        return load_rows(name, paradigm, self.sources.split or spec.split, data_dir=folder)

    def rows(self, prompt: str) -> Sequence[int]:
        return choose_rows(len(self.data[prompt]), None, self.sources.limit)

    def record(self, prompt: str, number: int) -> Any:
        return self.data[prompt][number]

    def example(self, prompt: str, number: int, *, flipped: bool) -> EvaluationExample:
        row = self.data[prompt][number]
        good, bad = row.get("sentence_good"), row.get("sentence_bad")
        if not (isinstance(good, str) and isinstance(bad, str) and good.strip() and bad.strip()):
            raise UnusableRow("no texts sentence_good and sentence_bad", str(row)[:80])
        return EvaluationExample(number, "", (good, bad), 0)


class PreparedTask(Task):
    """The held-out examples of one dataset in a folder of ``metro prepare-prompts``."""

    def __init__(self, spec: TaskSpec, sources: Sources):
        super().__init__(spec, sources)
        assert spec.data is not None
        side, folder = sources.split or spec.split, spec.data
        tasks = read_manifest(folder)["splits"].get(side, {})
        files = {
            facts["prompt_name"]: folder / side / task / f"{side}.jsonl"
            for task, facts in tasks.items()
            if name_of(facts["dataset"], facts["subset"]) == spec.name
        }
        if absent := [prompt for prompt in self.prompts if prompt not in files]:
            raise DatasetUnavailable(
                f"task {spec.name}: {folder} has no {side} examples of prompt {absent[0]!r}"
            )
        self.files = {prompt: PromptedExamples(files[prompt]) for prompt in self.prompts}

    def rows(self, prompt: str) -> Sequence[int]:
        return choose_rows(len(self.files[prompt]), None, self.sources.limit)

    def record(self, prompt: str, number: int) -> Any:
        return self.files[prompt][number]

    def example(self, prompt: str, number: int, *, flipped: bool) -> EvaluationExample:
        example = self.files[prompt][number]
        check_choices(example["target"], example["answer_choices"], example["label"], 2)
        if flipped and not example["instruction"]:
            raise UnusableRow(NO_INSTRUCTION)
        return EvaluationExample.of(example)


CLASSES: dict[str, type[Task]] = {
    "templates": TemplateTask,
    "label_generalization": TemplateTask,
    "mmlu": MmluTask,
    "bigbench": BigBenchTask,
    "minimal_pairs": MinimalPairsTask,
    "prepared": PreparedTask,
}


def load_task(spec: TaskSpec, sources: Sources) -> Task:
    """Load the data of a task.

    Raises:
        DatasetUnavailable: they are not available here; the message says what to do.
        UserError: they are there and wrong.
    """
    return CLASSES[spec.kind](spec, sources)


def own_rows(spec: TaskSpec) -> Sequence[dict]:
    """Open the rows of a task's own `data`: a file, or a folder of ``save_to_disk``.

    Raises:
        DatasetUnavailable: it is not there, or a folder of other things.
    """
    assert spec.data is not None
    if spec.data.is_dir() and kind_of(spec.data) is None:
        splits = splits_in(spec.data)
        split = find_split(splits, spec.split) if spec.split else next(iter(splits), None)
        if split is None or (len(splits) > 1 and not spec.split):
            raise DatasetUnavailable(
                f"task {spec.name}: {spec.data} has {shortened(sorted(splits)) or 'no rows'}: name "
                "one of them as the task's `split`"
            )
        return open_rows(splits[split])
    if not spec.data.exists():
        raise DatasetUnavailable(f"task {spec.name}: there is no file {spec.data}")
    return open_rows(spec.data)


def load_tasks(suite: Suite, sources: Sources) -> tuple[list[Task], dict[str, str]]:
    """Load the tasks of a suite; return them, and the reasons why others are not available."""
    tasks: list[Task] = []
    missing: dict[str, str] = {}
    for spec in suite.tasks.values():
        try:
            tasks.append(load_task(spec, sources))
            missing |= tasks[-1].unavailable
        except DatasetUnavailable as error:
            missing[spec.name] = str(error)
    return tasks, missing


def choose_rows(num_rows: int, max_rows: int | None, limit: int | None) -> list[int]:
    """Choose row numbers, ascending: a seeded sample of ``max_rows``, ``limit`` of it evenly."""
    indices = list(range(num_rows))
    if max_rows is not None and num_rows > max_rows:
        indices = sorted(random.Random(MAX_ROWS_SEED).sample(indices, max_rows))
    if limit is not None and len(indices) > limit:
        indices = [indices[i * len(indices) // limit] for i in range(limit)]
    return indices
