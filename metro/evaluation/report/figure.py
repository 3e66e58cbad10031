"""The papers' picture as hand-written SVG: a point per prompt, per task, with median and published.

Two forms. Panels, one per task, where tasks have several prompts and short names (T0 Eval); rows,
one per task and sorted, where there are many tasks or one prompt each (BIG-bench, MMLU). Both are
drawn inside the page, which folds them to its width, and together as a file of its own for slides.

Colours are CSS variables (`--run-0`, `--ink`, ...), so that light, dark and paper share a drawing.
Every run has a shape too, for those who print in grey.
"""

import math
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import NamedTuple

import numpy as np

from metro.evaluation.report.comparison import ReportRun, Section
from metro.evaluation.report.naming import task_title
from metro.evaluation.report.svg_marks import RADIUS, diamond, line, mark, spread, text
from metro.evaluation.report.tables import is_wide
from metro.evaluation.runs.published import PublishedRow
from metro.utils.messages import counted, percent

NUM_COLOURS = 6
PANEL_HEIGHT = 290
PLOT_TOP, PLOT_BOTTOM = 46, 256
GUTTER = 34  # left of a panel, for its axis
MOST_ROWS = 20  # more stand in two columns
MOST_WIDTH = 1200  # of the file with panels
LANE, NARROW_LANE = 44, 34  # least width of a run in a panel; where there are many


class Scale(NamedTuple):
    """The axis that all tasks of a section share, in percent."""

    low: int
    high: int

    @property
    def ticks(self) -> list[int]:
        step = 5 if self.high - self.low <= 20 else 10 if self.high - self.low <= 50 else 20
        return [tick for tick in range(0, 101, step) if self.low <= tick <= self.high]

    def fraction(self, value: float) -> float:
        """Where a value (a fraction) lies between the ends, 0 to 1."""
        return (100 * value - self.low) / (self.high - self.low)


def make_scale(section: Section) -> Scale:
    """Round ends around everything that is drawn, never narrower than 20 points."""
    values = [1.0 * row.values[task] for row in section.rows if row.kind != "difference"
              for task in section.tasks if task in row.values]  # fmt: skip
    for report_run in section.runs:
        for task in report_run.summary.tasks.values():
            values += section.values_per_prompt(task).values()
    low = 10 * math.floor(10 * min(values, default=0) + 1e-9)
    high = 10 * math.ceil(10 * max(values, default=1) - 1e-9)
    while high - low < 20:
        low, high = max(0, low - 10), min(100, high + 10)
    return Scale(low, high)


def has_panels(section: Section) -> bool:
    counts = [task.num_prompts for run in section.runs for task in run.summary.tasks.values()]
    return is_wide(section) and float(np.median(counts)) > 1


def others(section: Section) -> list[PublishedRow]:
    """Published rows other than those that a run is compared with."""
    own = [report_run.published for report_run in section.runs]
    return [row for row in section.published if row not in own]


# ---- panels ----------------------------------------------------------------------------------


def panel_width(section: Section) -> int:
    lanes = num_lanes(section)
    return max(172, GUTTER + 4 + lanes * (LANE if lanes <= 5 else NARROW_LANE))


def num_lanes(section: Section) -> int:
    return len(section.runs) + bool(others(section))


def panel(section: Section, task: str, scale: Scale) -> str:
    """The elements of one panel, `panel_width` x PANEL_HEIGHT."""
    width, lanes = panel_width(section), num_lanes(section)

    def y(value: float) -> float:
        return PLOT_BOTTOM - scale.fraction(value) * (PLOT_BOTTOM - PLOT_TOP)

    parts = [
        text(0, 14, task_title(task), "title"),
        text(0, 29, panel_subtitle(section, task), "sub"),
    ]
    for tick in scale.ticks:
        height = y(tick / 100)
        parts.append(line(GUTTER, height, width, height, "grid"))
        parts.append(text(GUTTER - 6, height + 3.5, str(tick), "tick end"))
    if lanes <= 5:  # else the first median stands where the word would
        parts.append(text(0, PANEL_HEIGHT - 12, "median", "sub"))
    chance = chance_of(section, task)
    if chance is not None:
        parts.append(
            line(GUTTER, y(chance), width, y(chance), "chance", f"guessing {percent(chance)}")
        )
    pitch = (width - GUTTER) / lanes
    for index, report_run in enumerate(section.runs):
        centre = GUTTER + pitch * (index + 0.5)
        parts.append(lane(section, report_run, task, centre, pitch, y))
    if others(section):
        centre = GUTTER + pitch * (lanes - 0.5)
        for row in others(section):
            if task in row.values:
                parts.append(
                    diamond(centre, y(row.values[task]), 3.2, "other", published_text(row, task))
                )
    return "".join(parts)


def lane(section, report_run: ReportRun, task: str, centre: float, pitch: float, y) -> str:
    """A run's points, median and published value in a panel."""
    summary = report_run.summary.tasks.get(task)
    values = section.values_per_prompt(summary) if summary else {}
    if not values:
        return ""
    parts = [f'<g class="run-{report_run.colour % NUM_COLOURS}">']
    # Points left of the published value, which would cover them otherwise.
    half = min(20.0, pitch / 2 - 7)
    middle = centre - 5
    median = section.median(summary)
    hint = f"{report_run.label}: median {percent(median)}"
    parts.append(line(middle - half, y(median), middle + half, y(median), "median", hint))
    heights = {prompt: y(value) for prompt, value in values.items()}
    for prompt, (dx, height) in spread(heights, half - RADIUS).items():
        hint = f"{report_run.label} · {prompt}: {percent(values[prompt])}"
        parts.append(mark(report_run.colour, middle + dx, height, RADIUS, hint))
    parts.append(text(middle, PANEL_HEIGHT - 12, percent(median, 1), "value middle"))
    row = report_run.published
    if row and task in row.values:
        x, height = middle + half + 5, y(row.values[task])
        parts.append(diamond(x, height, 4.6, "own", published_text(row, task)))
    return "".join(parts) + "</g>"


def panel_subtitle(section: Section, task: str) -> str:
    found = [run.summary.tasks[task] for run in section.runs if task in run.summary.tasks]
    prompts = max(summary.num_prompts for summary in found)
    examples = max(summary.num_examples for summary in found)
    return f"{counted(prompts, 'prompt')} · {counted(examples, 'example', grouped)}"


def grouped(number: float) -> str:
    """12 345, with narrow spaces."""
    return f"{number:,.0f}".replace(",", "\u202f")


# ---- rows ------------------------------------------------------------------------------------


def sorted_tasks(section: Section) -> list[str]:
    """Best first, by the mean over the runs that have the task."""

    def value(task: str) -> float:
        found = [
            row.values[task] for row in section.rows if row.kind == "run" and task in row.values
        ]
        return float(np.mean(found)) if found else -1.0

    return sorted(section.tasks, key=lambda task: (-value(task), task))


def row_height(section: Section) -> int:
    return 22 if section.one_prompt else max(24, 14 + 7 * len(section.runs))


def row(section: Section, task: str, scale: Scale) -> str:
    """The elements of one row: positions across are in percent of a width not known yet."""
    height = row_height(section)
    middle = height / 2
    parts = []
    for tick in scale.ticks:
        x = across(scale, tick / 100)
        parts.append(line(x, 0, x, height, "grid"))
    chance = chance_of(section, task)
    if chance is not None:
        x = across(scale, chance)
        parts.append(line(x, 0, x, height, "chance tick", f"guessing {percent(chance)}"))
    found = [run.values[task] for run in section.rows if run.kind == "run" and task in run.values]
    if section.one_prompt and len(found) > 1:
        ends = across(scale, min(found)), across(scale, max(found))
        parts.append(line(ends[0], middle, ends[1], middle, "span"))
    for published in others(section):
        if task in published.values:
            drawn = diamond(0, 0, 3.2, "other", published_text(published, task))
            parts.append(at(scale, published.values[task], middle, drawn))
    for index, report_run in enumerate(section.runs):
        if task in report_run.summary.tasks:
            # Side by side where a run has several points; on one line where it has one.
            offset = 0 if section.one_prompt else 7 * (index - (len(section.runs) - 1) / 2)
            parts += row_marks(section, report_run, task, scale, middle + offset)
    return "".join(parts)


def row_marks(
    section: Section, report_run: ReportRun, task: str, scale: Scale, height: float
) -> Iterable[str]:
    """A run's points, median and published value in a row."""
    summary = report_run.summary.tasks[task]
    values = section.values_per_prompt(summary)
    yield f'<g class="run-{report_run.colour % NUM_COLOURS}">'
    if len(values) > 1:
        median = section.median(summary)
        drawn = line(0, -6, 0, 6, "median", f"{report_run.label}: median {percent(median)}")
        yield at(scale, median, height, drawn)
    for prompt, value in values.items():
        hint = f"{report_run.label} · {prompt}: {percent(value)}"
        yield at(
            scale,
            value,
            height,
            mark(report_run.colour, 0, 0, 4 if len(values) == 1 else RADIUS, hint),
        )
    own = report_run.published
    if own and task in own.values:
        drawn = diamond(0, 0, 4.6, "own", published_text(own, task))
        yield at(scale, own.values[task], height, drawn)
    yield "</g>"


def row_axis(scale: Scale) -> str:
    return "".join(
        text(across(scale, tick / 100), 12, str(tick), "tick middle") for tick in scale.ticks
    )


def across(scale: Scale, value: float) -> str:
    return f"{place(scale, value):.2f}%"


def place(scale: Scale, value: float) -> float:
    """Percent of the width, a little inside the ends so that marks are not cut."""
    return 1.5 + 97 * scale.fraction(value)


def at(scale: Scale, value: float, height: float, drawn: str) -> str:
    """Elements drawn around the origin, moved to a value."""
    box = f'x="{across(scale, value)}" y="{height:.1f}" width="1" height="1" overflow="visible"'
    return f"<svg {box}>{drawn}</svg>"


def published_text(row: PublishedRow, task: str) -> str:
    return f"{row.title}, published: {percent(row.values[task])} ({row.source})"


def chance_of(section: Section, task: str) -> float | None:
    return next(
        (row.values[task] for row in section.rows if row.kind == "chance" and task in row.values),
        None,
    )


# ---- legend and the file of its own ----------------------------------------------------------


def legend(section: Section) -> list[tuple[str, str]]:
    """(drawing of 22 x 14, words) of everything the figure holds."""
    items = []
    for report_run in section.runs:
        number = report_run.colour
        drawn = f'<g class="run-{number % NUM_COLOURS}">{mark(number, 11, 7, 3.8, "")}</g>'
        items.append((drawn, report_run.label))
    if not section.one_prompt:
        items.append((line(2, 7, 20, 7, "median key"), "median of the prompts, each a point"))
    if any(report_run.published for report_run in section.runs):
        items.append((diamond(11, 7, 4.6, "own key", ""), "published mean, same model"))
    if others(section):
        items.append((diamond(11, 7, 3.2, "other", ""), "published mean, other models"))
    if any(row.kind == "chance" for row in section.rows):
        drawn = (
            line(1, 7, 21, 7, "chance")
            if has_panels(section)
            else line(11, 0, 11, 14, "chance tick")
        )
        items.append((drawn, "guessing"))
    return items


def standalone(section: Section) -> str:
    """The figure of a section as one SVG file."""
    scale = make_scale(section)
    body: list[str] = []
    if has_panels(section):
        pitch = panel_width(section) + 22
        columns = min(len(section.tasks), MOST_WIDTH // pitch)
        width = columns * pitch - 22
        top = legend_height(section, width) + 50
        for number, task in enumerate(section.tasks):
            x, y = number % columns * pitch, top + number // columns * (PANEL_HEIGHT + 14)
            body.append(f'<g transform="translate({x},{y})">{panel(section, task, scale)}</g>')
        height = top + math.ceil(len(section.tasks) / columns) * (PANEL_HEIGHT + 14)
    else:
        width, labels, tall = 860, 270, row_height(section)
        top = legend_height(section, width) + 50
        inner = width - labels
        body.append(
            f'<svg x="{labels}" y="{top}" width="{inner}" height="18">{row_axis(scale)}</svg>'
        )
        for number, task in enumerate(sorted_tasks(section)):
            y = top + 18 + number * tall
            if number % 2 == 0:
                body.append(f'<rect class="band" x="0" y="{y}" width="{width}" height="{tall}"/>')
            body.append(text(labels - 12, y + tall / 2 + 4, task_title(task), "name end"))
            body.append(f'<svg x="{labels}" y="{y}" width="{inner}" height="{tall}">'
                        f"{row(section, task, scale)}</svg>")  # fmt: skip
        height = top + 18 + len(section.tasks) * tall
    head = text(0, 18, f"{section.title}: {section.metric_title} per prompt, in percent", "head")
    margin = 20
    box = (-margin, -margin, width + 2 * margin, height + 2 * margin)
    return "".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(map(str, box))}" '
        f'width="{box[2]}" height="{box[3]}" role="img">',
        f"<title>{escape(section.title)}</title><style>{style()}</style>",
        f'<rect class="paper" x="{-margin}" y="{-margin}" width="100%" height="100%"/>',
        head, *legend_elements(section, width), *body, "</svg>\n",
    ])  # fmt: skip


def legend_elements(section: Section, width: float) -> Iterable[str]:
    for x, y, drawn, words in legend_places(section, width):
        yield f'<g transform="translate({x:.0f},{y})">{drawn}{text(26, 11, words, "key")}</g>'


def legend_height(section: Section, width: float) -> int:
    return max(y for _, y, _, _ in legend_places(section, width)) - 10


def legend_places(section: Section, width: float) -> list[tuple[float, int, str, str]]:
    """Items from left to right, a new line where one does not fit."""
    x, y, found = 0.0, 34, []
    for drawn, words in legend(section):
        needed = 26 + 6.6 * len(words) + 20
        if x and x + needed > width:
            x, y = 0.0, y + 20
        found.append((x, y, drawn, words))
        x += needed
    return found


def style() -> str:
    """Variables and classes of the drawing, which the page has too."""
    return (
        resources.files("metro.evaluation").joinpath("report/assets/figure.css").read_text("utf-8")
    )
