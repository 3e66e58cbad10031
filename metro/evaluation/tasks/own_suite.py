"""A suite of one task: rows of one's own, and how to ask about them."""

from metro.data.own_prompts import own_templates
from metro.data.own_rows import OwnData
from metro.evaluation.settings import EvaluationSettings
from metro.evaluation.tasks.suites import Suite, TaskSpec
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
    templates = own_templates(settings, data, rows, progress, needs_choices="evaluation")
    inline = {
        each.name: {"jinja": each.jinja, "answer_choices": each.answer_choices or ""}
        for each in templates
    }
    spec = TaskSpec(data.name, "templates", tuple(inline), data.name, inline=inline, rows=rows)
    return Suite(f"rows-{data.name}", f"{data.name} (own rows)", {data.name: spec})
