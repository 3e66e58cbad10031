"""The papers' picture as hand-written SVG: a point per prompt, per task, with median and published value.

Two forms. Panels, one per task, where tasks have several prompts and short names (T0 Eval); rows, one
per task and sorted, where there are many tasks or one prompt each (BIG-bench, MMLU). Both are drawn
inside the page, which folds them to its width, and together as a file of its own for slides.

Colours are CSS variables (`--run-0`, `--ink`, ...), so that light, dark and paper share one drawing.
Every run has a shape too, for those who print in grey.
"""

import math
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import NamedTuple

import numpy as np

from metro.evaluation.comparison import PublishedRow, ReportRun, Section, task_title
from metro.evaluation.report_tables import is_wide, percent

NUM_COLOURS = 6
SHAPES = ("circle", "square", "up", "down", "bar")
PANEL_HEIGHT = 236
PLOT_TOP, PLOT_BOTTOM = 44, 206
GUTTER = 34  # left of a panel, for its axis
RADIUS = 3.0
ROW_HEIGHT = 24


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
    return max(168, GUTTER + 12 + 30 * num_lanes(section))


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
    chance = chance_of(section, task)
    if chance is not None:
        parts.append(
            line(GUTTER, y(chance), width, y(chance), "chance", f"guessing {percent(chance)}")
        )
    pitch = (width - GUTTER) / lanes
    for index, report_run in enumerate(section.runs):
        centre = GUTTER + pitch * (index + 0.5)
        parts.append(lane(section, report_run, index, task, centre, pitch, y))
    if others(section):
        centre = GUTTER + pitch * (lanes - 0.5)
        for row in others(section):
            if task in row.values:
                parts.append(
                    diamond(centre, y(row.values[task]), 3.2, "other", published_text(row, task))
                )
    return "".join(parts)


def lane(
    section, report_run: ReportRun, index: int, task: str, centre: float, pitch: float, y
) -> str:
    """A run's points, median and published value in a panel."""
    summary = report_run.summary.tasks.get(task)
    values = section.values_per_prompt(summary) if summary else {}
    if not values:
        return ""
    parts = [f'<g class="run-{index % NUM_COLOURS}">']
    heights = {prompt: y(value) for prompt, value in values.items()}
    for prompt, (dx, height) in spread(heights, pitch / 2 - RADIUS - 1).items():
        hint = f"{report_run.label} · {prompt}: {percent(values[prompt])}"
        parts.append(mark(index, centre + dx, height, RADIUS, hint))
    median = section.median(summary)
    half = min(13.0, pitch / 2 - 2)
    parts.append(line(centre - half, y(median), centre + half, y(median), "halo"))
    parts.append(line(centre - half, y(median), centre + half, y(median), "median",
                      f"{report_run.label}: median {percent(median)}"))  # fmt: skip
    parts.append(text(centre, PANEL_HEIGHT - 14, percent(median, 1), "value middle"))
    row = report_run.published
    if row and task in row.values:
        parts.append(diamond(centre, y(row.values[task]), 4.6, "own", published_text(row, task)))
    return "".join(parts) + "</g>"


def panel_subtitle(section: Section, task: str) -> str:
    found = [run.summary.tasks[task] for run in section.runs if task in run.summary.tasks]
    prompts = max(summary.num_prompts for summary in found)
    examples = max(summary.num_examples for summary in found)
    return f"{count(prompts, 'prompt')} · {count(examples, 'example')}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}".replace(",", " ")


def spread(heights: dict[str, float], most: float) -> dict[str, tuple[float, float]]:
    """Points moved sideways, as little as needed, until they no longer cover each other."""
    placed: list[tuple[float, float]] = []
    found = {}
    steps = [0.0]
    for number in range(1, 40):
        offset = number * RADIUS * 0.5
        if offset <= most:
            steps += [offset, -offset]
    for prompt in sorted(heights, key=lambda prompt: (heights[prompt], prompt)):
        height = heights[prompt]
        near = [point for point in placed if abs(point[1] - height) < 2 * RADIUS]

        def room(dx: float, near=near, height=height) -> float:
            return min((math.hypot(dx - x, height - y) for x, y in near), default=math.inf)

        free = [dx for dx in steps if room(dx) >= 2 * RADIUS]
        dx = free[0] if free else max(steps, key=room)
        placed.append((dx, height))
        found[prompt] = (dx, height)
    return found


# ---- rows ------------------------------------------------------------------------------------


def sorted_tasks(section: Section) -> list[str]:
    """Best first, by the mean over the runs that have the task."""

    def value(task: str) -> float:
        found = [
            row.values[task] for row in section.rows if row.kind == "run" and task in row.values
        ]
        return float(np.mean(found)) if found else -1.0

    return sorted(section.tasks, key=lambda task: (-value(task), task))


def row(section: Section, task: str, scale: Scale) -> str:
    """The elements of one row: positions across are in percent of a width not known yet."""
    parts = [line(f"{place(scale, tick / 100):.2f}%", 0, f"{place(scale, tick / 100):.2f}%", ROW_HEIGHT,
                  "grid") for tick in scale.ticks]  # fmt: skip
    middle = ROW_HEIGHT / 2
    chance = chance_of(section, task)
    if chance is not None:
        x = f"{place(scale, chance):.2f}%"
        parts.append(line(x, 4, x, ROW_HEIGHT - 4, "chance", f"guessing {percent(chance)}"))
    for published in others(section):
        if task in published.values:
            hint = published_text(published, task)
            parts.append(
                at(scale, published.values[task], middle, diamond(0, 0, 3.2, "other", hint))
            )
    pitch = min(6.0, 14.0 / len(section.runs))
    for index, report_run in enumerate(section.runs):
        summary = report_run.summary.tasks.get(task)
        if summary is None:
            continue
        height = middle + (index - (len(section.runs) - 1) / 2) * pitch
        values = section.values_per_prompt(summary)
        parts.append(f'<g class="run-{index % NUM_COLOURS}">')
        size = 3.8 if len(values) == 1 else RADIUS
        for prompt, value in values.items():
            hint = f"{report_run.label} · {prompt}: {percent(value)}"
            parts.append(at(scale, value, height, mark(index, 0, 0, size, hint)))
        if len(values) > 1:
            median = section.median(summary)
            hint = f"{report_run.label}: median {percent(median)}"
            parts.append(
                at(
                    scale,
                    median,
                    height,
                    line(0, -6, 0, 6, "halo") + line(0, -6, 0, 6, "median", hint),
                )
            )
        own = report_run.published
        if own and task in own.values:
            drawn = diamond(0, 0, 4.6, "own", published_text(own, task))
            parts.append(at(scale, own.values[task], height, drawn))
        parts.append("</g>")
    return "".join(parts)


def row_axis(scale: Scale) -> str:
    return "".join(
        text(f"{place(scale, tick / 100):.2f}%", 12, str(tick), "tick middle")
        for tick in scale.ticks
    )


def place(scale: Scale, value: float) -> float:
    """Percent of the width, a little inside the ends so that marks are not cut."""
    return 1.5 + 97 * scale.fraction(value)


def at(scale: Scale, value: float, height: float, drawn: str) -> str:
    """Elements drawn around the origin, moved to a value."""
    x = f"{place(scale, value):.2f}%"
    return f'<svg x="{x}" y="{height:.1f}" width="1" height="1" overflow="visible">{drawn}</svg>'


# ---- elements --------------------------------------------------------------------------------


def mark(index: int, x: float, y: float, r: float, hint: str) -> str:
    """A prompt of a run: shape and colour say which run."""
    shape = SHAPES[index % len(SHAPES)]
    inside = f"<title>{escape(hint)}</title>"
    if shape == "circle":
        return f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}">{inside}</circle>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "up": [(0, -1.2), (1.1, 0.85), (-1.1, 0.85)],
        "down": [(0, 1.2), (1.1, -0.85), (-1.1, -0.85)],
        "bar": [(-1.2, -0.45), (1.2, -0.45), (1.2, 0.45), (-1.2, 0.45)],
    }[shape]
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return f'<polygon class="point" points="{points}">{inside}</polygon>'


def diamond(x: float, y: float, r: float, name: str, hint: str) -> str:
    points = f"{x:.1f},{y - r:.1f} {x + r:.1f},{y:.1f} {x:.1f},{y + r:.1f} {x - r:.1f},{y:.1f}"
    return f'<polygon class="{name}" points="{points}"><title>{escape(hint)}</title></polygon>'


def line(x1, y1, x2, y2, name: str, hint: str = "") -> str:
    ends = [value if isinstance(value, str) else f"{value:.1f}" for value in (x1, y1, x2, y2)]
    inside = f"<title>{escape(hint)}</title>" if hint else ""
    return '<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}</line>'.format(name, *ends, inside)


def text(x, y: float, content: str, name: str) -> str:
    x = x if isinstance(x, str) else f"{x:.1f}"
    return f'<text class="{name}" x="{x}" y="{y:.1f}">{escape(content)}</text>'


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
    for index, report_run in enumerate(section.runs):
        drawn = (
            f'<g class="run-{index % NUM_COLOURS}">{mark(index, 11, 7, 3.8, report_run.label)}</g>'
        )
        items.append((drawn, report_run.label))
    counts = [task.num_prompts for run in section.runs for task in run.summary.tasks.values()]
    if max(counts) > 1:
        items.append((line(2, 7, 20, 7, "median key"), "median of the prompts, each a point"))
    if any(report_run.published for report_run in section.runs):
        items.append((diamond(11, 7, 4.6, "own key", ""), "published, same model"))
    if others(section):
        items.append((diamond(11, 7, 3.2, "other", ""), "published, other models"))
    if any(row.kind == "chance" for row in section.rows):
        items.append((line(1, 7, 21, 7, "chance"), "guessing"))
    return items


def standalone(section: Section) -> str:
    """The figure of a section as one SVG file."""
    scale = make_scale(section)
    body: list[str] = []
    if has_panels(section):
        columns = min(len(section.tasks), 6)
        pitch = panel_width(section) + 22
        width = columns * pitch - 22
        top = legend_height(section, width) + 50
        for number, task in enumerate(section.tasks):
            x, y = number % columns * pitch, top + number // columns * (PANEL_HEIGHT + 14)
            body.append(f'<g transform="translate({x},{y})">{panel(section, task, scale)}</g>')
        height = top + math.ceil(len(section.tasks) / columns) * (PANEL_HEIGHT + 14)
    else:
        width, labels = 860, 270
        top = legend_height(section, width) + 50
        inner = width - labels
        body.append(
            f'<svg x="{labels}" y="{top}" width="{inner}" height="18">{row_axis(scale)}</svg>'
        )
        for number, task in enumerate(sorted_tasks(section)):
            y = top + 18 + number * ROW_HEIGHT
            body.append(text(labels - 12, y + ROW_HEIGHT / 2 + 4, task_title(task), "name end"))
            body.append(f'<svg x="{labels}" y="{y}" width="{inner}" height="{ROW_HEIGHT}">'
                        f"{row(section, task, scale)}</svg>")  # fmt: skip
        height = top + 18 + len(section.tasks) * ROW_HEIGHT
    head = text(0, 18, f"{section.title}: {section.metric_title} per prompt, in percent", "head")
    margin = 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} {-margin} {width + 2 * margin} '
        f'{height + 2 * margin}" width="{width + 2 * margin}" height="{height + 2 * margin}" role="img">'
        f"<title>{escape(section.title)}</title><style>{style()}</style>"
        f'<rect class="paper" x="{-margin}" y="{-margin}" width="100%" height="100%"/>'
        f"{head}{''.join(legend_elements(section, width))}{''.join(body)}</svg>\n"
    )


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
    return resources.files("metro.evaluation").joinpath("page/figure.css").read_text("utf-8")
