"""Prompts of one's own rows: templates, answer choices, and the folder that finetuning reads.

The folder is one of ``metro prepare-prompts``, made by the same code: rows of a single dataset, and
templates that were given instead of found in a tree.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from metro.data.own_rows import OwnData, check_fields, drawn_apart, values_of
from metro.data.prompts.examples import ExampleSettings
from metro.data.prompts.instruction import split_template
from metro.data.prompts.limits import TemplateError
from metro.data.prompts.mixtures import Mixture
from metro.data.prompts.plan import PromptPlan
from metro.data.prompts.prepare import prepare_plan
from metro.data.prompts.sandbox import fields_read
from metro.data.prompts.sources import Part, PartPlan, PromptSources, SplitRows, Unavailable
from metro.data.prompts.templates import PromptTemplate
from metro.data.settings import OwnRowsSettings, check_options
from metro.utils.files import read_json, write_json
from metro.utils.identity import digest, files_identity
from metro.utils.messages import UserError, counted, percent, shortened
from metro.utils.progress import SILENT, Progress

DEFAULT_TEMPLATE = (
    "{{text}}\n\nWhich of the following best describes the text above? "
    '{{answer_choices | join(", ")}}'
)
"""The question of `metro rank` and of own rows, where the user asks none."""
MOST_OPTIONS = 50
"""Values of a field that are answer choices by themselves."""
LEAST_ROWS_TO_DIVIDE = 100
VALIDATION_SHARE = 0.2
MOST_VALIDATION_ROWS = 500
LEFT_OUT, CHOICES = "left_out.json", "choices.json"
_FIELD = re.compile(r"\s*\{\{\s*([^\W\d]\w*)\s*\}\}\s*")


class Question(NamedTuple):
    """A template of own rows."""

    name: str
    text: str
    answer: str
    """The part behind ``|||``."""

    @property
    def field(self) -> str | None:
        """The field that is the answer; None where it is more than a field."""
        found = _FIELD.fullmatch(self.answer)
        return found and found[1]

    @property
    def target(self) -> str:
        """What is asked for: the field, or the text of the answer."""
        return self.field or self.answer.strip()


def own_questions(settings: OwnRowsSettings, rows: Sequence[dict], data: str) -> list[Question]:
    """Read the templates that the settings give, and check them on the first rows.

    Args:
        settings: how to ask.
        rows: of ``data``.
        data: for messages.

    Raises:
        UserError: a template is none, has no answer, or a field is not there.
    """
    check_fields(rows, [settings.input_field, settings.target_field], data)
    questions = []
    for number, text in enumerate(settings.template or [DEFAULT_TEMPLATE], start=1):
        name = f"template {number}"
        if "|||" not in text and settings.target_field:
            text = f"{text} ||| {_reading(settings.target_field)}"
        answer = split_template(text).answer
        if answer is None:
            raise UserError(
                f"{name} has no answer: write it behind |||, as '... ||| {{{{label}}}}', or name "
                "its field with target_field"
            )
        prompt = "".join(piece for piece, _ in split_template(text).pieces)
        try:
            asked, read = (fields_read(each) - {"answer_choices"} for each in (prompt, text))
        except TemplateError as error:
            raise UserError(f"{name} {error.problem}") from None
        if not asked:
            raise UserError(
                f"{name} reads no field, and asks the same of all: write '{{{{text}}}}'"
            )
        check_fields(rows, sorted(read - {"text"} if settings.input_field else read), data)
        questions.append(Question(name, text, answer))
    return questions


def own_templates(
    settings: OwnRowsSettings,
    data: OwnData,
    rows: Sequence[dict],
    progress: Progress,
    needs_choices: str | None,
    trained: Mapping[str, list[str]] = {},
) -> tuple[list[PromptTemplate], dict[str, list[str]]]:
    """Make the templates of own rows, with the answer choices given or found.

    Args:
        settings: how to ask.
        data: names the dataset.
        rows: those whose answers may be the choices.
        progress: is told the choices that were found.
        needs_choices: what cannot do without answer choices, for the message.
        trained: target -> the answer choices that a model was finetuned with, which come before
            those found in the rows.

    Returns:
        The templates, and the answer choices of each target that has some.

    Raises:
        UserError: a template has no answer, a field is not there, or there are no answer choices.
    """
    templates = []
    found: dict[str, list[str] | None] = {}
    for question in own_questions(settings, rows, data.data):
        name, text, answer = question
        target = question.target
        if target not in found:
            found[target] = settings.options
            if settings.options is None and target in trained:
                found[target] = trained[target]
                shown = shortened(trained[target], 20)
                progress.say(
                    f"answer choices of {target!r}, those of the finetuning: {shown} (--options "
                    "gives others)"
                )
            elif settings.options is None and question.field:
                found[target] = _values(rows, question.field, data.data, progress, needs_choices)
        options = found[target]
        if options is None and needs_choices:
            raise UserError(f"{needs_choices} needs answer choices: give --options")
        if settings.input_field:
            shown = _reading(settings.input_field)
            text = text.replace("{{text}}", shown) if options else f"{shown} |||{answer}"
        choices = None if options is None else "|||".join(map(_literal, options))
        templates.append(PromptTemplate(data.name, None, name, text, choices))
    return templates, {target: options for target, options in found.items() if options}


def own_choices(folder: Path) -> dict[str, list[str]]:
    """Return the answer choices of each target of prepared prompts; none of rows of others."""
    return read_json(folder / CHOICES) if (folder / CHOICES).is_file() else {}


def _reading(field: str) -> str:
    """Write the Jinja text that reads a field.

    Raises:
        UserError: Jinja cannot name it.
    """
    if not field.isidentifier():
        raise UserError(
            f"the field {field!r} cannot be named in a template: rename it (letters, digits, _)"
        )
    return f"{{{{{field}}}}}"


def _literal(option: str) -> str:
    """Write an answer choice as Jinja text."""
    return f"{{{{ {json.dumps(option, ensure_ascii=False)} }}}}" if "{" in option else option


def _values(
    rows: Sequence[dict], field: str, data: str, progress: Progress, needs_choices: str | None
) -> list[str] | None:
    """Find the values of an answer's field, sorted, where they are few enough to choose from."""
    values: set[str] = set()
    for value in values_of(rows, field):
        if value is not None and (text := str(value).strip()):
            values.add(text)
        if len(values) > MOST_OPTIONS:
            break
    if 2 <= len(values) <= min(MOST_OPTIONS, len(rows) // 2):
        found = sorted(values)
        check_options(found, f"the field {field!r} of {data}")
        progress.say(
            f"answer choices, the values of {field!r} in {data}: {shortened(found, 20)} (--options "
            "gives others)"
        )
        return found
    number = f"more than {MOST_OPTIONS} values"
    if len(values) <= MOST_OPTIONS:
        number = counted(len(values), "value")
    problem = (
        f"{field!r} in {data} has {number} in {counted(len(rows), 'row')}: too "
        f"{'few' if len(values) < 2 else 'many'} to choose from: give --options"
    )
    if needs_choices:
        raise UserError(f"{needs_choices} needs answer choices, but {problem}")
    progress.say(f"no answer choices: {problem}")
    return None


class OwnSources(PromptSources):
    """The rows of own data, as the two sides of one dataset."""

    def __init__(
        self,
        data: OwnData,
        sides: dict[str, SplitRows],
        templates: Sequence[PromptTemplate],
    ):
        self.data, self.sides, self.own_templates = data, sides, tuple(templates)
        self.mixture = Mixture(
            data.name,
            ((data.name, None),),
            needs_choices=all(template.answer_choices for template in templates),
            cap=max(1, *(len(side.rows) for side in sides.values())),
            fold_whitespace=False,
        )
        self.source, self.data_dir, self.validation = "rows", None, "all"
        self.limits = {"train": None, "valid": None}
        self.nothing_made = f"{data.data}: no row makes a prompt"

    def plans(self) -> list[PartPlan]:
        return [
            PartPlan(self.data.name, None, side, self.own_templates, self.mixture.cap)
            for side in self.sides
        ]

    def without_templates(self) -> list[Unavailable]:
        return []

    def left_out(self) -> dict[str, str]:
        return {}

    def load(self, plan: PartPlan) -> Part:
        return Part(plan, (self.sides[plan.side],), None)

    def local_files(self) -> list[list]:
        """Return what tells one content and division of the rows from another."""
        sides = [[side, rows.split, len(rows.rows)] for side, rows in self.sides.items()]
        numbers = [getattr(rows.rows, "numbers", None) for rows in self.sides.values()]
        return [[files_identity(self.data.local_files())], *sides, [digest(numbers)]]


def training_split(data: OwnData) -> str:
    """Find the split of own data that is for training.

    Raises:
        UserError: nothing says which.
    """
    return data.choose(None, "train", "training", remedy="call one of them train")


def divided(
    data: OwnData, valid_fraction: float | None, seed: int, progress: Progress
) -> dict[str, SplitRows]:
    """Divide own data into rows for training and rows for validation.

    Args:
        data: its splits decide, where one is for validation.
        valid_fraction: share of the training rows, where none is; None: a fifth of them, at most
            500, and nothing of fewer than 100.
        seed: of the draw.
        progress: is told what is used for what.

    Raises:
        UserError: nothing says which rows are for training.
    """
    train = training_split(data)
    valid = data.find("validation")
    rows = data.rows(train)
    sides = {"train": SplitRows(train, rows)}
    if valid not in (None, train) and not valid_fraction:
        sides["valid"] = SplitRows(valid, data.rows(valid))
        how = f"the split {valid!r}"
    else:
        if valid_fraction is None and len(rows) >= LEAST_ROWS_TO_DIVIDE:
            valid_fraction = min(VALIDATION_SHARE, MOST_VALIDATION_ROWS / len(rows))
        if valid_fraction and len(rows) > 1:
            kept, drawn = drawn_apart(rows, valid_fraction, seed)
            sides = {"train": SplitRows(train, kept), "valid": SplitRows(train, drawn)}
        how = "drawn at random; --valid-fraction changes it"
    counts = [f"{len(side.rows):,} rows" for side in sides.values()]
    valid_rows = f"{counts[1]} for validation ({how})" if len(counts) > 1 else "none for validation"
    progress.say(f"{data.data}: {counts[0]} for training, {valid_rows}")
    if unused := sorted({*data.splits} - {side.split for side in sides.values()}):
        progress.say(f"not used: {shortened(unused)}")
    return sides


def prepare_own_rows(
    settings: OwnRowsSettings,
    data: str,
    out: Path,
    *,
    valid_fraction: float | None = None,
    seed: int = 0,
    needs_choices: str | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Make a folder of prepared prompts of own rows, and say which rows are left out and why.

    Args:
        settings: how to ask.
        data: file, folder or dataset.
        out: the folder to make; an earlier one of other rows or templates is replaced.
        valid_fraction, seed: see `divided`.
        needs_choices: see `own_templates`.
        progress: shows all of it.

    Returns:
        ``out``. ``left_out.json`` in it has the rows left out: reason, number, share, first;
        ``choices.json`` the answer choices, see `own_choices`.

    Raises:
        UserError: there is no such data, they do not suit the templates, or no row can be used.
    """
    texts = [settings.input_field] if settings.input_field else []
    found = OwnData(data, settings.subset, settings.split_field, texts)
    sides = divided(found, valid_fraction, seed, progress)
    rows = sides["train"].rows
    templates, choices = own_templates(settings, found, rows, progress, needs_choices)
    sources = OwnSources(found, sides, templates)
    rendering = ExampleSettings(needs_choices=sources.mixture.needs_choices)
    plan = PromptPlan(sources.mixture, sources, "jsonl", None, rendering, lower=True)
    prepared = prepare_plan(plan, out, progress, overwrite=True)
    total = len(templates) * sum(len(side.rows) for side in sides.values())
    left_out = [
        {"reason": reason, "rows": facts["count"], "share": facts["count"] / total, **facts}
        for reason, facts in prepared.manifest["dropped"].items()
    ]
    for each in left_out:
        each.pop("count")
        progress.say(
            f"{counted(each['rows'], 'row')} left out ({percent(each['share'])} %): "
            f"{each['reason']} (first: {each['first']})"
        )
    write_json(out / LEFT_OUT, left_out)
    write_json(out / CHOICES, choices)
    return out
