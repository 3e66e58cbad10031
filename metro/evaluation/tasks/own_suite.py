"""A suite of one task: rows of one's own, and how to ask about them."""

from collections.abc import Sequence

from metro.data.own_prompts import own_templates
from metro.data.own_rows import OwnData
from metro.evaluation.settings import EvaluationSettings
from metro.evaluation.tasks.suites import Suite, TaskSpec
from metro.models.source import trained_choices
from metro.utils.messages import UserError
from metro.utils.progress import Progress


def own_suite(settings: EvaluationSettings, progress: Progress) -> Suite:
    """Make a suite of the rows and templates that the settings give.

    Its name is ``rows-<file>``, so that no file passes for a suite of METRO.

    Raises:
        UserError: there are no such rows, or they do not suit the templates.
    """
    assert settings.data is not None
    texts = [settings.input_field] if settings.input_field else []
    data = OwnData(settings.data, settings.subset, settings.split_field, texts)
    split = data.choose(settings.split, "test", "validation")
    rows = data.rows(split)
    progress.say(f"{data.data}: {len(rows):,} rows{f' of the split {split!r}' if split else ''}")
    trained = {} if settings.options else choices_of(settings.models)
    templates, _ = own_templates(settings, data, rows, progress, "evaluation", trained)
    inline = {
        each.name: {"jinja": each.jinja, "answer_choices": each.answer_choices or ""}
        for each in templates
    }
    spec = TaskSpec(data.name, "templates", tuple(inline), data.name, inline=inline, rows=rows)
    return Suite(f"rows-{data.name}", f"{data.name} (own rows)", {data.name: spec})


def choices_of(models: Sequence[str]) -> dict[str, list[str]]:
    """Find the answer choices that models were finetuned with on own rows: target -> choices.

    Raises:
        UserError: two models have different ones.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for model in models:
        for target, choices in trained_choices(model).items():
            first, others = found.setdefault(target, (model, choices))
            if sorted(others) != sorted(choices):
                raise UserError(
                    f"{first} and {model} were finetuned with different answer choices of "
                    f"{target!r}: give --options"
                )
    return {target: choices for target, (_, choices) in found.items()}
