"""The report as one self-contained HTML page: no resource from outside, light, dark and paper.

`assets/page.html` is the template, rendered with autoescape: whatever comes from run folders is
text.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

import metro
from metro.evaluation.report import figure
from metro.evaluation.report.comparison import ReportRun, Row, Section
from metro.evaluation.report.naming import task_title
from metro.evaluation.report.svg_marks import mark
from metro.evaluation.report.tables import (
    PARTIAL,
    average_cell,
    cell,
    is_wide,
    prompts_of,
    signed,
    statistics_grid,
)
from metro.evaluation.runs.run_folder import PromptResult
from metro.evaluation.runs.summary import interval_text
from metro.utils.messages import counted, percent


class PromptLine(NamedTuple):
    """A line of the table of prompts."""

    task: str
    prompt: str
    examples: str
    results: list[PromptResult | None]
    """One per run."""


def page(title: str, sections: Sequence[Section], other_files: Sequence[str] = ()) -> str:
    """The page. `other_files` are named at its foot."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"slug": slug, "counted": counted}
    environment.globals |= {
        "average": average,
        "cell": cell,
        "cell_class": cell_class,
        "differences": differences,
        "has_best": lambda section: any(row.best for row in section.rows),
        "has_panels": figure.has_panels,
        "has_partial": lambda section: any(row.partial for row in section.rows),
        "interval_text": interval_text,
        "is_long": lambda section: len(section.tasks) > figure.MOST_ROWS,
        "is_wide": is_wide,
        "key_mark": key_mark,
        "legend": lambda section: [(Markup(a), b) for a, b in figure.legend(section)],
        "make_scale": figure.make_scale,
        "num_colours": figure.NUM_COLOURS,
        "panel": drawing(figure.panel),
        "panel_height": figure.PANEL_HEIGHT,
        "panel_width": figure.panel_width,
        "partial": PARTIAL,
        "percent": percent,
        "prompt_lines": prompt_lines,
        "row": drawing(figure.row),
        "row_axis": drawing(figure.row_axis),
        "row_groups": row_groups,
        "row_height": figure.row_height,
        "row_name": row_name,
        "row_parts": row_parts,
        "run_facts": run_facts,
        "run_rows": lambda section: [row for row in section.rows if row.kind == "run"],
        "sign": sign,
        "signed": signed,
        "statistics_grid": statistics_grid,
        "task_title": task_title,
        "under_average": under_average,
    }
    return environment.from_string(read("page.html")).render(
        title=title,
        sections=sections,
        css=Markup(read("figure.css") + read("page.css")),
        js=Markup(read("page.js")),
        version=metro.__version__,
        other_files=other_files,
    )


def read(name: str) -> str:
    return resources.files("metro.evaluation").joinpath("report/assets", name).read_text("utf-8")


def drawing(function):
    """The function with its result marked as markup: the drawing escapes texts itself."""
    return functools.wraps(function)(lambda *args: Markup(function(*args)))


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "suite"


def key_mark(colour: int) -> Markup:
    return Markup(
        f'<svg width="14" height="14" aria-hidden="true">{mark(colour, 7, 7, 4.6, "")}</svg>'
    )


def differences(section: Section) -> dict[int, Row]:
    return {row.run_index: row for row in section.rows if row.kind == "difference"}


def under_average(section: Section, report_run: ReportRun, row: Row) -> list[str]:
    """What is said below the average on a run's card."""
    parts = []
    if not row.says_method:
        parts.append(row.detail)
    interval = report_run.summary.average_interval
    if interval and section.metric == "accuracy":
        parts.append(f"95 % interval {interval_text(interval)}")
    if row.average is not None and row.num_averaged < len(section.tasks):
        parts.append(f"over {row.num_averaged} of {len(section.tasks)} tasks")
    return parts


def row_groups(section: Section) -> list[tuple[str, list[Row]]]:
    """Runs with their differences, published rows, guessing: a table body each."""
    groups: dict[str, list[Row]] = {}
    for row in section.rows:
        groups.setdefault({"difference": "run"}.get(row.kind, row.kind), []).append(row)
    return list(groups.items())


def row_name(section: Section, row: Row) -> Markup:
    name = escape(row.label)
    if row.kind == "run":
        colour = f"run-{row.colour % figure.NUM_COLOURS}"
        return Markup(f'<span class="dot {colour}">{key_mark(row.colour)}</span>') + name
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
    """Class of a difference: within 0.005 points is none, as printed."""
    return "same" if abs(value) < 5e-5 else "more" if value > 0 else "less"


def average(section: Section, row: Row) -> Markup:
    """The average, over how many tasks below it."""
    text, _, of = average_cell(row, section).partition(" (")
    return escape(text) + (
        Markup('<span class="of">') + of.rstrip(")") + Markup("</span>") if of else Markup("")
    )


def row_parts(section: Section) -> list[list[str]]:
    """Tasks of the rows; many stand in two columns."""
    tasks = figure.sorted_tasks(section)
    half = (len(tasks) + 1) // 2
    return [tasks[:half], tasks[half:]] if len(tasks) > figure.MOST_ROWS else [tasks]


def prompt_lines(section: Section) -> list[PromptLine]:
    found: list[dict[tuple[str, str], PromptResult]] = [
        {(result.task, result.prompt): result for result in report_run.run.results}
        for report_run in section.runs
    ]
    lines = []
    for key in prompts_of(section):
        results = [results.get(key) for results in found]
        counts = sorted({result.num_examples for result in results if result})
        examples = "–".join(str(count) for count in {counts[0]: 0, counts[-1]: 0})
        lines.append(PromptLine(task_title(key[0]), key[1], examples, results))
    return lines


def run_facts(report_run: ReportRun) -> list[tuple[str, list[tuple[str, str]]]]:
    """What there is to know about how a run was made, in groups."""
    run, summary = report_run.run, report_run.summary
    num_examples = sum(result.num_examples for result in run.results)
    facts = [("model", run.model), ("method", run.method), ("folder", str(run.folder))]
    if run.registered:
        facts.append(("registered as", run.registered))
    facts.append(("prompts", f"{len(run.results)} on {figure.grouped(num_examples)} examples"))
    if summary.seconds:
        rate = num_examples / summary.seconds
        facts.append(("time", f"{duration(summary.seconds)}, {figure.grouped(rate)} examples/s"))
    groups = [("run", facts)]
    for name, values in (
        ("protocol", run.protocol),
        ("options", run.options),
        ("versions", run.versions),
    ):
        items = [(words(key), plain(value)) for key, value in flat(values)]
        if items:
            groups.append((name, items))
    return groups


def flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Items that are set; a dict inside becomes items of its own."""
    items = []
    for key, value in values.items():
        if isinstance(value, dict):
            items += [(f"{key} {inner}", item) for inner, item in flat(value)]
        elif value not in (None, "", []):
            items.append((str(key), value))
    return items


def words(name: str) -> str:
    return name.replace("_", " ")


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
