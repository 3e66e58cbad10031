"""Tasks with their data: rows and templates become examples, for any kind of suite."""

import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from metro.data.datasets import DatasetUnavailable, JsonlRows, load_rows
from metro.data.prompts.instruction import NotFlippable, flip
from metro.data.prompts.limits import MissingAnswer
from metro.data.prompts.templates import PromptTemplate, TemplateTree, find_templates
from metro.evaluation.tasks import bigbench
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.label_generalization import LABEL_WORDS, replace_label_words
from metro.evaluation.tasks.suites import WHOLE_TASK, Suite, TaskSpec
from metro.utils.messages import UserError

SUBTASK_STRIDE = 1_000_000
"""Row numbers of the subtasks of a BIG-bench task begin at multiples of this."""
MAX_ROWS_SEED = 42
NO_LABEL = "the answer is none of the options (a split without labels?)"


@dataclass(frozen=True)
class Sources:
    """Where data comes from, and which part of it is used."""

    data_dir: Path | None = None
    templates: Path | None = None
    bigbench_dir: Path | None = None
    split: str | None = None
    """Instead of the suite's."""
    limit: int | None = None
    """Rows per task, spread evenly over the split."""
    instruction_text: str = "published"
    label_words: str = "words"
    seed: int = 0
    """Of Jinja's random draws."""

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; use at least 1, or leave it out")
        if self.label_words not in LABEL_WORDS:
            raise UserError(
                f"label words are {self.label_words!r}; use one of {', '.join(LABEL_WORDS)}"
            )
        for option, folder in (
            ("--data-dir", self.data_dir),
            ("--bigbench-dir", self.bigbench_dir),
        ):
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"{option} {folder} is not a folder")
        if self.templates is not None:
            find_templates(self.templates)  # now, as rows may take long to come

    @cached_property
    def tree(self) -> TemplateTree:
        return find_templates(self.templates)


@dataclass
class Examples:
    """The examples of one prompt."""

    examples: list[EvaluationExample] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    """Reason -> rows that could not be asked."""


class Task:
    """A task that can be evaluated.

    Raises:
        DatasetUnavailable: its data are not to be had here.
    """

    def __init__(self, spec: TaskSpec, sources: Sources):
        self.spec, self.sources, self.name = spec, sources, spec.name
        self.prompts = list(spec.prompts)

    def weight(self, prompt: str) -> float:
        """Rough amount of work, for the progress bar: characters of all rows."""
        raise NotImplementedError

    def iterate(self, prompt: str, *, flipped: bool) -> Iterator[EvaluationExample | str]:
        """Examples, or for a row that cannot be asked the reason."""
        raise NotImplementedError

    def examples(self, prompt: str, *, flipped: bool = False) -> Examples:
        """All examples of a prompt.

        Raises:
            ValueError: there is none; the message says why.
        """
        found = Examples()
        for item in self.iterate(prompt, flipped=flipped):
            if isinstance(item, str):
                found.skipped[item] += 1
            else:
                found.examples.append(item)
        if not found.examples:
            reason = found.skipped.most_common(1)[0][0] if found.skipped else "it has no rows"
            raise UserError(
                f"task {self.name}, prompt {prompt!r}: no row can be evaluated: {reason}"
            )
        return found


class TemplateTask(Task):
    """Rows of a dataset asked with prompt templates."""

    def __init__(self, spec: TaskSpec, sources: Sources):
        super().__init__(spec, sources)
        if spec.data is not None:
            if not spec.data.is_file():
                raise DatasetUnavailable(f"task {spec.name}: there is no file {spec.data}")
            self.rows: Sequence[dict] = JsonlRows(spec.data)
        else:
            split = sources.split or spec.split
            name = spec.dataset if sources.data_dir is not None else spec.hub or spec.dataset
            self.rows = load_rows(name, spec.subset, split, data_dir=sources.data_dir)
        self.templates = {prompt: self.find_template(prompt) for prompt in self.prompts}
        self.indices = choose_rows(len(self.rows), spec.max_rows, sources.limit)

    def find_template(self, prompt: str) -> PromptTemplate:
        spec = self.spec
        if prompt in spec.inline:
            texts = spec.inline[prompt]
            return PromptTemplate(
                spec.dataset, spec.subset, prompt, texts["jinja"], texts["answer_choices"]
            )
        place = (spec.template.get("dataset", spec.dataset),
                 spec.template.get("subset", spec.subset))  # fmt: skip
        return self.sources.tree.template(*place, prompt)

    def row(self, index: int) -> dict:
        return self.rows[index]

    def weight(self, prompt: str) -> float:
        few = self.indices[:: max(1, len(self.indices) // 20)]
        size = sum(len(str(self.row(index))) for index in few) / max(1, len(few))
        return len(self.indices) * (100 + size)

    def iterate(self, prompt: str, *, flipped: bool) -> Iterator[EvaluationExample | str]:
        template = self.templates[prompt]
        if not template.answer_choices:
            raise UserError(
                f"template {prompt!r} of {template.dataset} has no answer choices: it cannot be "
                "evaluated by ranking options"
            )
        for index in self.indices:
            yield self.example(template, index, flipped)

    def example(
        self, template: PromptTemplate, index: int, flipped: bool
    ) -> EvaluationExample | str:
        row = self.row(index)
        key = f"{self.sources.seed} {template.dataset} {template.name} {index}"
        draw = zlib.crc32(key.encode())
        try:
            rendered = template.render_example(row, seed=draw)
        except MissingAnswer:
            return NO_LABEL
        if rendered.target is None:
            return "the template renders no answer for the row"
        if rendered.label is None:
            return NO_LABEL
        parts = {}
        if flipped:
            try:
                flip_text = self.sources.instruction_text
                split = flip(template, row, instruction_text=flip_text, seed=draw)
            except NotFlippable as error:
                return str(error)
            parts = {"flipped_input": split.input, "instruction": split.instruction}
        if not all(choice.strip() for choice in rendered.choices):
            return "an answer choice is empty"
        example = EvaluationExample(
            index, rendered.input, rendered.choices, rendered.label, **parts
        )
        if self.spec.replace_words:
            words = self.spec.replace_words
            example = replace_label_words(example, words, self.sources.label_words)
        return example


class MmluTask(TemplateTask):
    """A subject of MMLU in the form of ARC: options A to D."""

    def row(self, index: int) -> dict:
        row = self.rows[index]
        for name in ("question", "choices", "answer"):
            if name not in row:
                place = getattr(self.rows, "path", f"subject {self.name}")
                raise UserError(f"{place}: row {index} has no {name!r}, so it is none of MMLU")
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
            prompt: bigbench.read_task(
                Path(root) / spec.name / ("" if prompt == WHOLE_TASK else prompt)
            )
            for prompt in self.prompts
        }

    def weight(self, prompt: str) -> float:
        examples = self.files[prompt].examples
        size = sum(len(str(example)) for example in examples[:20]) / len(examples[:20])
        return len(choose_rows(len(examples), None, self.sources.limit)) * (100 + size)

    def iterate(self, prompt: str, *, flipped: bool) -> Iterator[EvaluationExample | str]:
        first = self.prompts.index(prompt) * SUBTASK_STRIDE
        task = self.files[prompt]
        made = list(bigbench.make_examples(task, flipped=flipped, first_index=first))
        for index in choose_rows(len(made), None, self.sources.limit):
            yield made[index]


CLASSES = {
    "templates": TemplateTask,
    "label_generalization": TemplateTask,
    "mmlu": MmluTask,
    "bigbench": BigBenchTask,
}


def load_task(spec: TaskSpec, sources: Sources) -> Task:
    """A task with its data.

    Raises:
        DatasetUnavailable: they are not to be had here; the message says what to do.
        ValueError: they are there and wrong.
    """
    return CLASSES[spec.kind](spec, sources)


def load_tasks(suite: Suite, sources: Sources) -> tuple[list[Task], dict[str, str]]:
    """The tasks of a suite whose data are there, and why the others are not."""
    tasks, missing = [], {}
    for spec in suite.tasks.values():
        try:
            tasks.append(load_task(spec, sources))
        except DatasetUnavailable as error:
            missing[spec.name] = str(error)
    return tasks, missing


def choose_rows(num_rows: int, max_rows: int | None, limit: int | None) -> list[int]:
    """Row numbers in order: a seeded sample of ``max_rows``, of which ``limit`` evenly spread."""
    indices = list(range(num_rows))
    if max_rows is not None and num_rows > max_rows:
        indices = sorted(random.Random(MAX_ROWS_SEED).sample(indices, max_rows))
    if limit is not None and len(indices) > limit:
        indices = [indices[i * len(indices) // limit] for i in range(limit)]
    return indices
