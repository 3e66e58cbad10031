"""A task of an evaluation: rows, chosen by number, that become questions.

What cannot be used is left out by name, and nothing else with it: rows of which no question can be
made, which are counted, and prompts that no row can be asked with.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.examples import LeftOut, count_row
from metro.data.prompts.instruction import NO_INSTRUCTION, has_text
from metro.data.prompts.templates import TemplateTree, find_templates
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.suites import TaskSpec
from metro.utils.identity import digest
from metro.utils.messages import UserError

MAX_ROWS_SEED = 42
Made = TypeVar("Made")


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
        UserError: none of its prompts can be used.
    """

    def __init__(self, spec: TaskSpec, sources: Sources):
        self.spec, self.sources, self.name = spec, sources, spec.name
        self.prompts = list(spec.prompts)
        """Those that can be used."""
        self.unusable: dict[str, str] = {}
        """The others, and why they cannot."""

    def for_prompts(self, make: Callable[[str], Made]) -> dict[str, Made]:
        """Make something for every prompt; one for which that fails is left out.

        Raises:
            UserError: none is left.
        """
        found, first = {}, None
        for prompt in self.prompts:
            try:
                found[prompt] = make(prompt)
            except UserError as error:
                self.unusable[prompt] = str(error)
                first = first or error
        if first and not found:
            raise first
        self.prompts = list(found)
        return found

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

    def examples(
        self,
        prompt: str,
        *,
        flipped: bool = False,
        prepare: Callable[[EvaluationExample], EvaluationExample] = lambda example: example,
    ) -> Examples:
        """Make all questions of a prompt.

        Args:
            prompt: one of ``prompts``.
            flipped: with the texts of FLIPPED.
            prepare: makes of a question what the model reads.

        Raises:
            UserError: there is none; the message says why.
        """
        found = Examples()
        for number in self.rows(prompt):
            try:
                example = self.example(prompt, number, flipped=flipped)
                if flipped and not has_text(example.instruction):
                    raise UnusableRow(NO_INSTRUCTION)
                found.examples.append(prepare(example))
            except UnusableRow as error:
                count_row(found.skipped, error, f"row {number}")
        if not found.examples:
            why = "it has no rows"
            if found.skipped:
                reason, left_out = max(found.skipped.items(), key=lambda item: item[1].num_rows)
                why = f"{reason} ({left_out.first})"
            raise UserError(f"no row can be evaluated: {why}")
        return found


def choose_rows(num_rows: int, max_rows: int | None, limit: int | None) -> list[int]:
    """Choose row numbers, ascending: a seeded sample of ``max_rows``, ``limit`` of it evenly."""
    indices = list(range(num_rows))
    if max_rows is not None and num_rows > max_rows:
        indices = sorted(random.Random(MAX_ROWS_SEED).sample(indices, max_rows))
    if limit is not None and len(indices) > limit:
        indices = [indices[i * len(indices) // limit] for i in range(limit)]
    return indices
