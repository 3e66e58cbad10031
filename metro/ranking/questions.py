"""Texts as questions: a template asks which of the options a text is.

A template is used as `metro evaluate` uses it, but for its answer, which nobody knows here: what is
left of ``|||`` asks, and the answer choices are the options given, or else the template's own.

A template reads the fields of a row by their names. A text that is no row, or a field named as
the text, is what a template with a single field reads, where the row has no such field.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from metro.data.datasets import name_of
from metro.data.jsonl_rows import UnusableRow
from metro.data.own_prompts import DEFAULT_TEMPLATE
from metro.data.prompts.examples import ExampleSettings, make_example
from metro.data.prompts.instruction import split_template
from metro.data.prompts.limits import TemplateError
from metro.data.prompts.sandbox import fields_read
from metro.data.prompts.templates import PromptTemplate, find_templates
from metro.data.settings import check_options
from metro.evaluation.tasks.examples import EvaluationExample
from metro.ranking.settings import RankSettings
from metro.utils.messages import UserError

REMEDY = "write 'What is this? {{text}}'"
OPTIONS = "options_to_rank"
"""Name of the options inside a template's answer choices."""


class Asked(NamedTuple):
    """A text and the questions about it."""

    text: str | None
    """None where several fields are read, and none is said to hold it."""
    questions: list[EvaluationExample]
    """One per template."""


class Questions:
    """Makes a question of a row under each template.

    Args:
        settings: templates, options, and the field of the text.
        flipped: with the instruction that FLIPPED scores.

    Raises:
        UserError: a template is not one, or nothing says what to choose from.
    """

    def __init__(self, settings: RankSettings, *, flipped: bool):
        self.text_field, self.options_field = settings.text, settings.options_field
        self.options = settings.fixed_options()
        self.has_options = bool(self.options or self.options_field)
        self.templates = [self._asking(template) for template in choose_templates(settings)]
        self.fields = [self._fields_of(template) for template in self.templates]
        self.is_default = not (settings.template or settings.prompt)
        read = set[str]().union(*self.fields)
        self.only_field = read.pop() if len(read) == 1 else None
        for template in self.templates if flipped else ():
            if not any(map(str.strip, split_template(template.jinja).runs)):
                raise UserError(f"{template.name} has no instruction for method flipped: {REMEDY}")
        self.settings = ExampleSettings(
            settings.seed, settings.instruction_text, needs_choices=True, with_instruction=flipped
        )

    def _asking(self, template: PromptTemplate) -> PromptTemplate:
        choices = f"{{{{ {OPTIONS} | join('|||') }}}}"
        if not self.has_options:
            if not template.answer_choices:
                raise UserError("nothing to choose from: give --options, such as --options yes no")
            choices = template.answer_choices
        prompt = "".join(text for text, _ in split_template(template.jinja).pieces)
        jinja = f"{prompt} ||| {{{{ answer_choices[0] }}}}"
        return replace(template, jinja=jinja, answer_choices=choices)

    def _fields_of(self, template: PromptTemplate) -> set[str]:
        """Find the fields of a row that a question reads, its answer choices left aside.

        Raises:
            UserError: it is no Jinja template, its answer's mark is inside a condition, or it asks
                the same of every row.
        """
        try:
            found = fields_read(template.jinja)
            of_choices = fields_read(template.answer_choices or "")
        except TemplateError as error:
            raise UserError(f"{template.name} {error.problem}; {REMEDY}") from None
        found -= {"answer_choices", OPTIONS}
        if not found and (of_choices == set() or self.options):
            raise UserError(f"{template.name} reads no field, and asks the same of all: {REMEDY}")
        return found

    def needed_fields(self, *, are_texts: bool) -> list[str]:
        """List the fields that rows must have.

        Args:
            are_texts: the rows are texts, not fields.
        """
        needed = {self.options_field} if self.options_field else set()
        for template, names in zip(self.templates, self.fields, strict=True):
            has_text = are_texts or self.text_field is not None
            needed |= names - {_filled(names)} if has_text else names
            if not self.has_options:
                needed |= fields_read(template.answer_choices or "")
        return sorted(needed)

    def _text(self, row: Any) -> str | None:
        if isinstance(row, str):
            text: Any = row
        elif not isinstance(row, Mapping):
            raise UnusableRow("no text", f"the row is {row!r}, not a text and not fields")
        elif self.only_field in row and not (self.is_default and self.text_field):
            text = row[self.only_field]
            if not isinstance(text, str):  # the template knows what to do with it
                return str(text) if isinstance(text, int | float) else None
        elif self.text_field is None:
            return None
        else:
            text = row.get(self.text_field)
        if not isinstance(text, str):
            raise UnusableRow("no text", f"the row's {self.text_field!r} is {text!r}")
        if not text.strip():
            raise UnusableRow("empty text")
        return text

    def ask(self, row: str | Mapping[str, Any], number: int) -> "Asked":
        """Make the questions of a row, one per template.

        Raises:
            UnusableRow: there is none.
        """
        text = self._text(row)
        fields = {} if isinstance(row, str) else dict(row)
        if self.has_options:
            fields[OPTIONS] = self.options or self._own_options(fields)
        questions = []
        for template, names in zip(self.templates, self.fields, strict=True):
            name, read = _filled(names), fields
            if text is not None and (self.is_default or name not in fields):
                read = {**fields, name: text}
            example = make_example(template, read, "", number, self.settings)
            questions.append(EvaluationExample.of(example))
        counts = {len(question.choices) for question in questions}
        if len(counts) > 1:
            raise UnusableRow("the templates have different numbers of answer choices", str(counts))
        choices = questions[0].choices
        if len(set(choices)) < len(choices):
            raise UnusableRow("an option twice", str(choices))
        return Asked(text, questions)

    def _own_options(self, fields: Mapping[str, Any]) -> list[str]:
        value = fields.get(self.options_field or "")
        if isinstance(value, str):
            try:
                parsed = json.loads(value)
            except ValueError:
                parsed = None
            value = parsed if isinstance(parsed, list) else value.split("|||")
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise UnusableRow("no options", f"the row's {self.options_field!r} is {value!r}")
        try:
            check_options(list(value), "options")
        except UserError as error:
            raise UnusableRow("no options to choose from", str(error)) from None
        return [each.strip() for each in value]


def choose_templates(settings: RankSettings) -> list[PromptTemplate]:
    """Make the templates that the settings name; the default one where they name none."""
    if settings.prompt:
        return [each for name in settings.prompt for each in _named(name, settings.templates)]
    texts = settings.template or [DEFAULT_TEMPLATE]
    return [
        PromptTemplate("", None, f"template {number}", text, None)
        for number, text in enumerate(texts, start=1)
    ]


def _filled(names: set[str]) -> str:
    """Name the field in which a template reads the text, where the row does not have it."""
    return next(iter(names)) if len(names) == 1 else "text"


def _named(prompt: str, tree: Any) -> list[PromptTemplate]:
    dataset, _, name = (part.strip() for part in prompt.partition(":"))
    templates = find_templates(tree)
    known = {name_of(*names): names for names in templates.datasets()}
    names = known.get(dataset, (dataset, None))
    if name:
        return [templates.template(*names, name)]
    return [each for each in templates.templates(*names) if each.answer_choices]
