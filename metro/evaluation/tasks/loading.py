"""Tasks with their data, one class for each kind of suite."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from metro.data.datasets import DatasetUnavailable, load_rows, name_of
from metro.data.jsonl_rows import UnusableRow
from metro.data.local_files import READABLE, open_rows, splits_in
from metro.data.own_rows import OwnData
from metro.data.prompts.examples import (
    ExampleSettings,
    PromptedExample,
    make_example,
)
from metro.data.prompts.labels import NO_LABEL
from metro.data.prompts.stored import PromptedExamples, files_of, read_manifest
from metro.data.prompts.templates import PromptTemplate
from metro.evaluation.tasks import bigbench
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.label_generalization import replace_label_words
from metro.evaluation.tasks.suites import WHOLE_TASK, Suite, TaskSpec
from metro.evaluation.tasks.task import Sources, Task, choose_rows
from metro.utils.checksums import refuse_damage
from metro.utils.files import inside
from metro.utils.messages import UserError

SUBTASK_STRIDE = 1_000_000
"""Row numbers of the subtasks of a BIG-bench task begin at multiples of this."""


class TemplateTask(Task):
    """Rows of a dataset asked with prompt templates."""

    def __init__(self, spec: TaskSpec, sources: Sources):
        super().__init__(spec, sources)
        self.split = ""
        if spec.rows is not None:
            self.data = spec.rows
        elif spec.data is not None:
            self.data = own_rows(spec)
        else:
            self.split = sources.split or spec.split
            name = spec.dataset if sources.data_dir is not None else spec.hub or spec.dataset
            self.data = load_rows(name, spec.subset, self.split, data_dir=sources.data_dir)
        self.templates = self.for_prompts(self.find_template)
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
            needs_choices=True,
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
        fields = ("question", "choices", "answer")
        if missing := [name for name in fields if row.get(name) in (None, "")]:
            raise UnusableRow("not a row of MMLU", f"it has no {', '.join(map(repr, missing))}")
        choices, answer = row["choices"], row["answer"]
        if not isinstance(choices, list | tuple):
            raise UnusableRow("not a row of MMLU", f"choices is {choices!r}, and must be a list")
        letters = [chr(ord("A") + number) for number in range(len(choices))]
        if isinstance(answer, str) and answer.isdecimal():
            answer = int(answer)
        if not (answer in letters or (type(answer) is int and 0 <= answer < len(letters))):
            raise UnusableRow(NO_LABEL, f"answer is {answer!r} of {len(letters)} choices")
        return {
            "question": row["question"],
            "choices": {"text": choices, "label": letters},
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
        self.files = self.for_prompts(
            lambda prompt: bigbench.read_task_file(
                inside(Path(root), f"{spec.name}/{'' if prompt == WHOLE_TASK else prompt}")
            )
        )

    def rows(self, prompt: str) -> Sequence[int]:
        return choose_rows(len(self.files[prompt].examples), None, self.sources.limit)

    def record(self, prompt: str, number: int) -> Any:
        example = self.files[prompt].examples[number]
        return str(example) if isinstance(example, UnusableRow) else example

    def recipe(self, prompt: str) -> Any:
        return self.files[prompt]._replace(examples=[])

    def example(self, prompt: str, number: int, *, flipped: bool) -> EvaluationExample:
        first = self.spec.prompts.index(prompt) * SUBTASK_STRIDE
        return bigbench.make_question(self.files[prompt], number, first + number, flipped=flipped)


class MinimalPairsTask(Task):
    """Pairs of sentences, the better one first; its prompts are the paradigms of a phenomenon."""

    def __init__(self, spec: TaskSpec, sources: Sources):
        super().__init__(spec, sources)
        self.data = self.for_prompts(self.open)

    def open(self, paradigm: str) -> Sequence[dict]:
        spec, folder = self.spec, self.sources.data_dir
        if folder:
            root = inside(Path(folder), spec.dataset)
            if paradigm in (files := splits_in(root)):
                return open_rows(files[paradigm])
            if not splits_in(inside(root, paradigm)):  # a reason that all of them share
                raise DatasetUnavailable(
                    f"{root} has no PARADIGM.jsonl (or {READABLE.removeprefix('.jsonl, ')}): put "
                    "it there, or leave --data-dir out to take it from the hub"
                )
        name = spec.dataset if folder else spec.hub or spec.dataset
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

        def read(prompt: str) -> PromptedExamples:
            if prompt not in files:
                raise DatasetUnavailable(f"{folder} has no {side} examples of it")
            place = files[prompt].parent.relative_to(folder)
            refuse_damage(folder, [f"{place}/{name}" for name in files_of(side)])
            return PromptedExamples(files[prompt])

        self.files = self.for_prompts(read)

    def rows(self, prompt: str) -> Sequence[int]:
        return choose_rows(len(self.files[prompt]), None, self.sources.limit)

    def record(self, prompt: str, number: int) -> Any:
        return self.files[prompt][number]

    def example(self, prompt: str, number: int, *, flipped: bool) -> EvaluationExample:
        example = self.files[prompt][number]
        if missing := sorted(PromptedExample.__required_keys__ - set(example)):
            raise UnusableRow("missing field", f"the line has no {', '.join(map(repr, missing))}")
        if not example["input"].strip():
            raise UnusableRow("empty input")
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
        UserError: they are there and wrong, or no prompt can be used.
    """
    return CLASSES[spec.kind](spec, sources)


def own_rows(spec: TaskSpec) -> Sequence[dict]:
    """Open the rows of a task's own `data`: a file, or a folder of ``save_to_disk``.

    Raises:
        DatasetUnavailable: it is not there, or a folder of other things.
    """
    assert spec.data is not None
    if not spec.data.exists():
        raise DatasetUnavailable(f"task {spec.name}: there is no file {spec.data}")
    try:
        data = OwnData(spec.data)
        return data.rows(data.choose(spec.split or None, remedy="name it as the task's `split`"))
    except UserError as error:
        raise DatasetUnavailable(f"task {spec.name}: {error}") from None


def load_tasks(suite: Suite, sources: Sources) -> tuple[list[Task], dict[str, str]]:
    """Load the tasks of a suite.

    Returns:
        The tasks, and why other ones ("task") or prompts ("task / prompt") cannot be used.
    """
    tasks: list[Task] = []
    missing: dict[str, str] = {}
    for spec in suite.tasks.values():
        try:
            task = load_task(spec, sources)
        except (UserError, OSError) as error:
            missing[spec.name] = str(error)
            continue
        tasks.append(task)
        missing |= {f"{spec.name} / {prompt}": why for prompt, why in task.unusable.items()}
    return tasks, missing
