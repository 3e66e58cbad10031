"""The report as one self-contained HTML page: no resource from outside, light, dark and paper.

`assets/page.html` is the template, rendered with autoescape: texts of run folders stay texts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

import metro
from metro.evaluation.report import figure, tables
from metro.evaluation.report.comparison import ReportRun, Row, Section
from metro.evaluation.report.naming import asset, grouped, task_title
from metro.evaluation.runs.run_folder import PromptResult
from metro.evaluation.runs.summary import interval_text
from metro.utils.files import file_name
from metro.utils.messages import counted, percent

LONG = 20
"""Tasks above which a table scrolls."""


class PromptLine(NamedTuple):
    """One line of the table of prompts."""

    task: str
    prompt: str
    examples: str
    results: list[PromptResult | None]
    """One per run."""


def page(title: str, sections: Sequence[Section], other_files: Sequence[str] = ()) -> str:
    """Render the page. `other_files` are named at its foot."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"file_name": file_name, "counted": counted}
    for function in (
        average, cell_class, colour, differences, drawings, legend, percent, prompt_lines,
        row_groups, row_name, run_facts, run_key, sign, task_title, under_average, tables.cell,
        tables.is_wide, tables.signed, tables.statistics_grid,
    ):  # fmt: skip
        environment.globals[function.__name__] = function
    return environment.from_string(asset("page.html")).render(
        title=title,
        sections=sections,
        css=Markup(asset("colours.css") + asset("page.css")),
        js=Markup(asset("page.js")),
        version=metro.__version__,
        other_files=other_files,
        partial=tables.PARTIAL,
        long=LONG,
    )


def drawings(section: Section) -> list[Markup]:
    return [Markup(drawing) for drawing in figure.drawings(section)]


def legend(section: Section) -> list[tuple[Markup, str]]:
    """(character, words) of everything that the figure holds."""
    names = {placeholder: name for name, placeholder in figure.PLACEHOLDERS.items()}
    return [
        (character_key(f"var(--{names[style['color']]})", character), words)
        for words, character, style in figure.legend(section)
    ]


def run_key(run: ReportRun) -> Markup:
    """Shape of a run in its colour."""
    shapes = list(figure.SHAPES.values())
    return character_key(colour(run), shapes[run.colour % len(shapes)])


def colour(run: ReportRun) -> str:
    return f"var(--run-{run.colour % figure.NUM_COLOURS})"


def character_key(css: str, character: str) -> Markup:
    return Markup(f'<span class="key" style="color: {css}" data-mark="{character}"></span>')


def differences(section: Section) -> dict[int | None, Row]:
    """Index of a run -> its difference to the published row."""
    return {row.run_index: row for row in section.rows if row.kind == "difference"}


def under_average(section: Section, report_run: ReportRun, row: Row) -> list[str]:
    """Remarks below the average on a run's card."""
    parts = []
    if not row.says_method:
        parts.append(row.detail)
    interval = report_run.summary.average_interval
    if interval and section.metric == "accuracy":
        parts.append(f"95 % interval {interval_text(interval)}")
    if row.average is not None and row.num_averaged < section.num_units:
        parts.append(f"over {row.num_averaged} of {section.num_units} {section.averaged_unit}s")
    return parts


def row_groups(section: Section) -> list[tuple[str, list[Row]]]:
    """Group runs with their differences, published rows, guessing: a table body each."""
    groups: dict[str, list[Row]] = {}
    for row in section.rows:
        groups.setdefault({"difference": "run"}.get(row.kind, row.kind), []).append(row)
    return list(groups.items())


def row_name(section: Section, row: Row) -> Markup:
    name = escape(row.label)
    if row.kind == "run" and row.run_index is not None:
        return run_key(section.runs[row.run_index]) + name
    if row.kind == "published":
        return name + Markup("<sup> ") + section.letters(row) + Markup("</sup>")
    return name


def cell_class(row: Row, task: str, *names: str) -> Markup:
    found = list(names)
    if task in row.best:
        found.append("best")
    if task in row.partial:
        found.append("part")
    elif row.kind == "difference" and task in row.values:
        found.append(sign(row.values[task]))
    return Markup(f' class="{" ".join(found)}"') if found else Markup("")


def sign(value: float) -> str:
    """Class of a difference; less than 0.005 points is none, as printed."""
    return "same" if abs(value) < 5e-5 else "more" if value > 0 else "less"


def average(section: Section, row: Row) -> Markup:
    """The average, and below it the number of its tasks or paradigms."""
    text, _, of = tables.average_cell(row, section).partition(" (")
    return escape(text) + (
        Markup('<span class="of">') + of.rstrip(")") + Markup("</span>") if of else Markup("")
    )


def prompt_lines(section: Section) -> list[PromptLine]:
    found: list[dict[tuple[str, str], PromptResult]] = [
        {(result.task, result.prompt): result for result in report_run.run.results}
        for report_run in section.runs
    ]
    lines = []
    for key in tables.prompts_of(section):
        results = [results.get(key) for results in found]
        counts = sorted({result.num_examples for result in results if result})
        examples = "–".join(str(count) for count in {counts[0]: 0, counts[-1]: 0})
        lines.append(PromptLine(task_title(key[0]), key[1], examples, results))
    return lines


def run_facts(report_run: ReportRun) -> list[tuple[str, list[tuple[str, str]]]]:
    """Circumstances of a run, in groups of (name, value)."""
    run, summary = report_run.run, report_run.summary
    num_examples = sum(result.num_examples for result in run.results)
    facts = [("model", run.model), ("method", run.method), ("folder", str(run.folder))]
    if run.registered:
        facts.append(("registered as", run.registered))
    facts.append(("prompts", f"{len(run.results)} on {grouped(num_examples)} examples"))
    if summary.seconds:
        rate = num_examples / summary.seconds
        facts.append(("time", f"{duration(summary.seconds)}, {grouped(rate)} examples/s"))
    groups = [("run", facts)]
    for group, values in (
        ("protocol", run.protocol),
        ("options", run.options),
        ("versions", run.versions),
    ):
        items = [(name.replace("_", " "), plain(value)) for name, value in flat(values)]
        if items:
            groups.append((group, items))
    return groups


def flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Items that are set; a dict inside becomes items of its own."""
    items = []
    for name, value in values.items():
        if isinstance(value, dict):
            items += [(f"{name} {inner}", item) for inner, item in flat(value)]
        elif value not in (None, "", []):
            items.append((str(name), value))
    return items


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12.4 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
