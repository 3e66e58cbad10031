"""The papers' picture: a point per prompt, with median, interval, chance and published value.

Every task is a strip with a lane per run, or one lane for all where tasks have one prompt. Strips
stand in columns as wide as a phone, which the page folds; a file for slides has them side by side.
matplotlib draws with placeholder colours, which become CSS variables (`--run-0`, `--ink`, ...), so
that light, dark and paper share a drawing; shapes tell runs apart in grey. Lengths are in pixels.
"""

import io
import math
import re
import warnings
from html import escape
from textwrap import shorten
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metro.evaluation.report.comparison import ReportRun, Section
from metro.evaluation.report.naming import asset, each_count, task_title
from metro.evaluation.report.tables import is_wide
from metro.evaluation.runs.published import PublishedRow
from metro.evaluation.runs.summary import interval_text
from metro.utils.messages import percent

Look = dict[str, Any]  # arguments of matplotlib
SHAPES = {"o": "●", "s": "■", "^": "▲", "v": "▼", ">": "►"}
"""matplotlib's marker of a run -> its character in HTML."""
NUM_COLOURS = 6
COLOURS = ("ink", "faint", "line", "paper", *(f"run-{number}" for number in range(NUM_COLOURS)))
PLACEHOLDERS = {name: f"#7e5c{number:02x}" for number, name in enumerate(COLOURS)}
INK, FAINT, LINE, PAPER, *RUNS = PLACEHOLDERS.values()
FONTS = "Inter, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "metro", "text.parse_math": False}
SMALL: Look = {"color": FAINT, "size": 10}
MEDIAN, INTERVAL = {"linewidth": 2.4}, {"linewidth": 1.4}
OWN: Look = {"marker": "D", "markersize": 5.5, "mew": 1.5, "color": INK, "mfc": PAPER, "ls": "none"}
OTHER: Look = {**OWN, "markersize": 4, "mew": 1, "color": FAINT}
CHANCE: Look = {"linewidth": 1.2, "linestyle": (0, (3, 2)), "color": FAINT}
COLUMN, GAP, AXIS, DIAMETER = 352, 32, 18, 6.0
TITLE, LANE, BELOW = 20, 28, 12
"""Heights: title of a strip, lane, published value and interval below the points of a run."""


class Drawing:
    """A figure measured from the top left, whose marks say what they are under the pointer."""

    def __init__(self, section: Section, width: float, height: float):
        self.section, self.hints = section, [""]
        self.low, self.high = section.scale()
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def x(self, left: float, accuracy: Any) -> Any:
        share = (100 * np.asarray(accuracy) - self.low) / (self.high - self.low)
        return left + 8 + share * (COLUMN - 48)

    def mark(self, left: float, accuracy: Any, y: Any, hint: str, **style: Any) -> None:
        x, y = np.broadcast_arrays(self.x(left, accuracy), y)
        self.axes.plot(x, y, gid=f"hint-{len(self.hints)}", clip_on=False, **style)
        self.hints.append(hint)

    def column(self, left: float, top: float, tasks: list[str]) -> "Drawing":
        """Draw the strips of some tasks below an axis; return the drawing."""
        section, height = self.section, strip_height(self.section)
        step = 5 if self.high - self.low <= 20 else 10 if self.high - self.low <= 50 else 20
        ticks = [tick for tick in range(0, 101, step) if self.low <= tick <= self.high]
        for tick in ticks:
            self.axes.text(self.x(left, tick / 100), top + 10, str(tick), ha="center", **SMALL)
        for number, task in enumerate(tasks):
            y = top + AXIS + number * height
            ends, xs = (y + TITLE, y + height - 4), [self.x(left, tick / 100) for tick in ticks]
            self.axes.vlines(xs, *ends, color=LINE, linewidth=1, zorder=0, clip_on=False)
            title = shorten(task_title(task), 48, placeholder=" …")
            self.axes.text(left, y + 15, title, color=INK, size=12, weight="bold")
            found = [run.summary.tasks[task] for run in section.runs if task in run.summary.tasks]
            if len(title) < 28 and not section.one_prompt:
                prompts = each_count([each.num_prompts for each in found], "prompt")
                examples = each_count([each.num_examples for each in found], "example")
                text = f"{prompts} · {examples}"
                self.axes.text(left + COLUMN, y + 15, text, ha="right", **SMALL)
            if (chance := section.chances.get(task)) is not None:
                self.mark(left, chance, ends, f"guessing {percent(chance)}", **CHANCE)
            for published in section.other_published:
                self.published(left, y + height - 15, published, task, OTHER)
            y += TITLE + 9
            for run in section.runs:
                if task in run.summary.tasks:
                    self.run(left, y, run, task)
                y += 0 if section.one_prompt else LANE
        return self

    def run(self, left: float, y: float, run: ReportRun, task: str) -> None:
        """Draw a run's points and median, below them its interval and published value."""
        summary, style = run.summary.tasks[task], run_style(run)
        values, median = self.section.values_per_prompt(summary), self.section.median(summary)
        name, color = run.label, style["color"]
        if not self.section.one_prompt or len(self.section.runs) == 1:  # in a lane of its own
            bold = {"color": color, "size": 11, "weight": "bold", "ha": "right"}
            self.axes.text(left + COLUMN, y + 4, percent(median, 1), **bold)
            if (ends := summary.interval) and self.section.metric == "accuracy":
                hint = f"{name}: mean {percent(summary.mean)}, 95 % interval {interval_text(ends)}"
                self.mark(left, ends, y + BELOW, hint, color=color, **INTERVAL)
        if len(values) > 1:
            hint = f"{name}: median {percent(median)}"
            self.mark(left, median, (y - 9, y + 9), hint, color=color, **MEDIAN)
        offsets = spread([self.x(left, value) for value in values.values()])
        for (prompt, value), offset in zip(values.items(), offsets, strict=True):
            hint = f"{name} · {prompt}: {percent(value)}"
            self.mark(left, value, y + offset, hint, alpha=0.6, mew=0.7, **style)
        if run.published:
            self.published(left, y + BELOW, run.published, task, OWN)

    def published(self, left: float, y: float, row: PublishedRow, task: str, style: Any) -> None:
        if task in row.values:
            hint = f"{row.title}, published: {percent(row.values[task])} ({row.source})"
            self.mark(left, row.values[task], y, hint, **style)

    def svg(self, head: str = "") -> str:
        """Write the figure as one `<svg>` element without ids, styles or fonts of its own."""
        file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():  # a reader's fonts show the text, whatever its script
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue().partition("<svg ")[2].replace("'DejaVu Sans'", FONTS)
        own = r'<defs>\s*<style.*?</defs>|(?<=<g|xt) id="(?!hint)[\w.]+"|(?<=\d)pt(?=" )'
        text = re.sub(own, "", text, flags=re.S).replace(">", f">{head}", 1)
        for name, placeholder in PLACEHOLDERS.items():
            text = text.replace(f": {placeholder}", f": var(--{name})")
        hint = re.compile(r'<g id="hint-(\d+)">')
        text = hint.sub(lambda g: f"<g><title>{escape(self.hints[int(g[1])])}</title>", text)
        return '<svg role="img" ' + text


def run_style(run: ReportRun) -> Look:
    """Colour and shape of a run."""
    color, marker = RUNS[run.colour % NUM_COLOURS], list(SHAPES)[run.colour % len(SHAPES)]
    return {"color": color, "marker": marker, "markersize": DIAMETER, "ls": "none"}


def strip_height(section: Section) -> int:
    if section.one_prompt:
        return TITLE + (LANE if section.published or len(section.runs) == 1 else 18)
    return TITLE + LANE * (len(section.runs) + bool(section.other_published)) + 4


def columns(section: Section) -> list[list[str]]:
    """Tasks of the columns: in the suite's order, or best first where they are many."""
    tasks = list(section.tasks)
    if not is_wide(section):
        found = [row.values for row in section.rows if row.kind == "run"]
        means = {t: np.mean([values[t] for values in found if t in values] or [-1]) for t in tasks}
        tasks.sort(key=lambda task: (-means[task], task))
    most = math.ceil(len(tasks) / 3)
    return [tasks[start : start + most] for start in range(0, len(tasks), most)]


def spread(positions: list[float]) -> list[float]:
    """Offsets of points on three levels, so that no point covers another if there is room."""
    offsets, last = [0.0] * len(positions), dict.fromkeys((0.0, DIAMETER, -DIAMETER), -math.inf)
    for number in sorted(range(len(positions)), key=lambda number: positions[number]):
        free = [level for level in last if positions[number] - last[level] >= DIAMETER]
        offsets[number] = free[0] if free else min(last, key=lambda level: last[level])
        last[offsets[number]] = positions[number]
    return offsets


def legend(section: Section) -> list[tuple[str, str, Look]]:
    """(words, character for HTML, style for matplotlib) of everything that the figure holds."""
    runs = [(run.label, SHAPES[run_style(run)["marker"]], run_style(run)) for run in section.runs]
    spread, one_run = not section.one_prompt, len(section.runs) == 1
    keys = [
        (spread, "median of the prompts, each a point", "❙", {"color": INK, **MEDIAN}),
        (spread or one_run, "95 % interval of the mean", "─", {"color": INK, **INTERVAL}),
        (any(run.published for run in section.runs), "published mean, same model", "◊", OWN),
        (bool(section.other_published), "published mean, other models", "◊", OTHER),
        (bool(section.chances), "guessing", "┆", CHANCE),
    ]
    return runs + [(words, character, look) for shown, words, character, look in keys if shown]


@rc_context(STYLE)
def drawings(section: Section) -> list[str]:
    """Draw the columns of a section, an `<svg>` each."""
    parts = columns(section)
    height = AXIS + len(parts[0]) * strip_height(section)
    return [Drawing(section, COLUMN, height).column(0, 0, tasks).svg() for tasks in parts]


@rc_context(STYLE)
def standalone(section: Section) -> str:
    """Draw the figure of a section as one SVG file."""
    parts, keys = columns(section), legend(section)
    width = 40 + (COLUMN + GAP) * max(2, len(parts)) - GAP
    per_line = max(1, int((width - 40) / (34 + 6.6 * max(len(words) for words, _, _ in keys))))
    top = 58 + 20 * math.ceil(len(keys) / per_line)
    height = top + AXIS + len(parts[0]) * strip_height(section) + 20
    drawing = Drawing(section, width, height)
    heading = shorten(f"{section.title}: {section.metric_title} per prompt, in percent", 80)
    drawing.axes.text(20, 34, heading, color=INK, size=17, weight="bold")
    drawing.figure.legend(
        [Line2D([], [], **style) for _, _, style in keys], [words for words, _, _ in keys],
        loc="upper left", bbox_to_anchor=(14 / width, 1 - 42 / height),
        ncols=per_line, frameon=False, fontsize=11, labelcolor=INK, handlelength=1.4,
    )  # fmt: skip
    for number, tasks in enumerate(parts):
        drawing.column(20 + number * (COLUMN + GAP), top, tasks)
    head = f"<title>{escape(section.title)}</title><style>{asset('colours.css')}</style>"
    return drawing.svg(head + '<rect width="100%" height="100%" style="fill: var(--paper)"/>')
