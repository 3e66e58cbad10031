"""The report as Markdown, CSV and LaTeX.

Markdown and LaTeX show the table as the papers print it: percent with two digits, tasks across
where they fit, down where there are many. The CSV files are tidy, one value per line, as fractions.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from metro.evaluation.report.comparison import Row, Section
from metro.evaluation.report.naming import task_title
from metro.evaluation.runs.summary import Summary, interval_text
from metro.utils.messages import percent

MOST_COLUMNS, LONGEST_TITLE = 14, 12
"""Tasks go down the page where they are more, or a title is longer."""
MINUS = "−"
PARTIAL = "†"


def is_wide(section: Section) -> bool:
    """True if tasks go across, as in the papers' tables of T0 Eval."""
    longest = max(len(task_title(task)) for task in section.tasks)
    return len(section.tasks) <= MOST_COLUMNS and longest <= LONGEST_TITLE


def cell(row: Row, task: str) -> str:
    """Percent with two digits; a difference has a sign; empty for a missing value."""
    value = row.values.get(task)
    if value is None:
        return ""
    text = signed(value) if row.kind == "difference" else percent(value)
    return text + PARTIAL if task in row.partial else text


def average_cell(row: Row, section: Section) -> str:
    """The average, with the number of its tasks or paradigms if there are more."""
    if row.average is None:
        return ""
    text = signed(row.average) if row.kind == "difference" else percent(row.average)
    if row.num_averaged == section.num_units:
        return text
    return f"{text} ({row.num_averaged} of {section.num_units})"


def signed(fraction: float) -> str:
    text = f"{100 * abs(fraction):.2f}"
    if float(text) == 0:
        return "±" + text
    return (MINUS if fraction < 0 else "+") + text


def name_of(row: Row, section: Section) -> str:
    """Label of a run, with its method if the section has several methods."""
    if row.kind == "published":
        return f"{row.label}, published ({section.letters(row)})"
    methods = {report_run.run.method for report_run in section.runs}
    if row.kind == "run" and len(methods) > 1 and not row.says_method:
        return f"{row.label}, {row.detail}"
    return row.label


def grid(section: Section) -> list[list[str]]:
    """Cells of the table, header first: tasks across if they fit, down otherwise."""
    titles = ["", *map(task_title, section.tasks), "AVG"]
    lines = [titles]
    for row in section.rows:
        values = [cell(row, task) for task in section.tasks]
        lines.append([name_of(row, section), *values, average_cell(row, section)])
    return lines if is_wide(section) else [list(line) for line in zip(*lines, strict=True)]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Write the whole report."""
    parts = [f"# {escape_markdown(title)}"]
    for section in sections:
        parts.append(f"## {escape_markdown(section.title)}")
        parts.append(
            f"Mean {section.metric_title} over prompts, in percent. AVG: mean over "
            f"{section.averaged_unit}s."
        )
        parts.append(markdown_table(grid(section)))
        remarks = [f"({letter}) {source}" for source, letter in section.sources.items()]
        if any(row.partial for row in section.rows):
            remarks.append(f"{PARTIAL} {section.partial_remark}")
        parts.append("\n".join(f"- {escape_markdown(text)}" for text in [*remarks, *section.notes]))
        for report_run in section.runs:
            parts.append(f"### {escape_markdown(report_run.label)}: per task")
            parts.append(markdown_table(statistics_grid(section, report_run.summary)))
        if not section.one_prompt:
            parts.append("### Per prompt")
            parts.append(markdown_table(prompt_grid(section)))
    parts.append(
        "Interval: 95 % bootstrap over examples. Std, lowest, highest: over prompts. "
        "Chance: the accuracy of guessing."
    )
    return "\n\n".join(parts) + "\n"


def statistics_grid(section: Section, summary: Summary) -> list[list[str]]:
    """Cells of all statistics of a run's tasks, header first; no spread over one prompt."""
    spread = "mean median std lowest highest IQR"
    names = (
        "task prompt examples accuracy" if section.one_prompt else f"task prompts examples {spread}"
    )
    columns = [*names.split(), "interval", "macro-F1", "chance"]
    lines = [columns]
    for task in summary.tasks.values():
        prompts = str(task.num_prompts)
        cells = {
            "task": task_title(task.task),
            "prompt": next(iter(task.accuracies), ""),
            "prompts": prompts if task.complete else f"{prompts} of {task.num_listed}",
            "examples": str(task.num_examples),
            "accuracy": percent(task.mean),
            "IQR": percent(task.quartiles[1] - task.quartiles[0]),
            "interval": interval_text(task.interval),
            "macro-F1": percent(task.macro_f1),
            "chance": percent(task.chance),
        }
        cells |= {name: percent(getattr(task, name)) for name in spread.split()[:-1]}
        lines.append([cells[column] for column in columns])
    return lines


def prompt_grid(section: Section) -> list[list[str]]:
    """Cells of the table with a line per prompt and a column per run."""
    lines = [["task", "prompt", *(report_run.label for report_run in section.runs)]]
    for task, prompt in prompts_of(section):
        values = []
        for report_run in section.runs:
            summary = report_run.summary.tasks.get(task)
            found = section.values_per_prompt(summary).get(prompt) if summary else None
            values.append(percent(found))
        lines.append([task_title(task), prompt, *values])
    return lines


def prompts_of(section: Section) -> list[tuple[str, str]]:
    """(task, prompt) of every prompt that a run has."""
    return list(
        dict.fromkeys(
            (task, result.prompt)
            for task in section.tasks
            for report_run in section.runs
            for result in report_run.run.by_task().get(task, [])
        )
    )


def markdown_table(lines: list[list[str]]) -> str:
    """Align the cells, so that the source reads as a table too."""
    cells = [[escape_markdown(text) for text in line] for line in lines]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(cells[0]))]
    text = [
        "| " + " | ".join(
            part.ljust(width) if column == 0 else part.rjust(width)
            for column, (part, width) in enumerate(zip(line, widths, strict=True))
        ) + " |"
        for line in cells
    ]  # fmt: skip
    rule = "| " + " | ".join(
        ("-" * width if column == 0 else "-" * (width - 1) + ":")
        for column, width in enumerate(widths)
    )
    return "\n".join([text[0], rule + " |", *text[1:]])


def escape_markdown(text: str) -> str:
    """Escape a text: no markup, no line break, no cell of its own."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#~]|\b_|_\b)", r"\\\1", text)


def write_csv(columns: str, lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns.split())
    writer.writerows([safe(item) for item in line] for line in lines)
    return out.getvalue()


def tasks_csv(sections: Sequence[Section]) -> str:
    """Write one line per (row, task), published rows too."""
    lines: list[list[Any]] = []
    for section in sections:
        for report_run in section.runs:
            published = report_run.published
            for name, task in report_run.summary.tasks.items():
                value = section.value(task)
                other = published.values.get(name) if published else None
                lines.append([
                    section.suite, "run", report_run.label, report_run.run.method,
                    published.source if published else None, name, section.metric, value,
                    None if value is None or other is None else value - other, task.complete,
                    task.num_prompts, task.num_listed, task.num_examples, task.mean, task.median,
                    task.std, task.lowest, task.highest, *task.quartiles,
                    *(task.interval or (None, None)), task.macro_f1, task.chance, task.seconds,
                    str(report_run.run.folder),
                ])  # fmt: skip
        for row in section.published:
            start = [section.suite, "published", row.title, "", row.source]
            for name, value in row.values.items():
                lines.append([*start, name, section.metric, value] + [""] * 18)
    return write_csv(
        "suite kind model method source task metric value difference complete prompts "
        "prompts_listed examples mean_accuracy median_accuracy std lowest highest quartile_1 "
        "quartile_3 interval_low interval_high macro_f1 chance seconds folder",
        lines,
    )


def prompts_csv(sections: Sequence[Section]) -> str:
    """Write one line per (run, task, prompt)."""
    return write_csv(
        "suite model method task prompt accuracy macro_f1 chance examples median_choices seconds "
        "folder",
        (
            [
                r.suite, run.label, r.method, r.task, r.prompt, r.accuracy, r.macro_f1, r.chance,
                r.num_examples, r.median_choices, r.seconds, str(run.run.folder),
            ]
            for section in sections
            for run in section.runs
            for results in run.run.by_task().values()
            for r in results
        ),
    )  # fmt: skip


def safe(item: Any) -> Any:
    """Quote a text that a spreadsheet would take for a formula; shorten floats."""
    if isinstance(item, str) and item[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + item
    if isinstance(item, float):
        return f"{item:.6g}" if math.isfinite(item) else ""
    return item


def latex(title: str, sections: Sequence[Section]) -> str:
    """Write a booktabs table per suite, for \\input."""
    parts = [f"% {one_line(title)}", "% needs \\usepackage{booktabs}"]
    parts += [latex_table(section) for section in sections]
    return "\n".join(parts) + "\n"


def latex_table(section: Section) -> str:
    lines = [[escape_latex(text) for text in line] for line in grid(section)]
    embolden(lines, section)
    header, body = lines[0], lines[1:]
    rows = [" & ".join(line) + r" \\" for line in body]
    if is_wide(section):
        groups = [row.kind.replace("difference", "run") for row in section.rows]
        for number in reversed(range(1, len(groups))):
            if groups[number] != groups[number - 1]:
                rows.insert(number, r"\midrule")
    else:
        rows.insert(len(rows) - 1, r"\midrule")  # above the average
    caption = f"{section.title}: mean {section.metric_title} over prompts, in percent."
    if any(row.partial for row in section.rows):
        caption += f" {PARTIAL} {section.partial_remark}."
    return "\n".join([
        r"\begin{table}", r"\centering\small",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule",
        " & ".join(header) + r" \\", r"\midrule", *rows, r"\bottomrule",
        r"\end{tabular}", r"\end{table}",
    ])  # fmt: skip


def embolden(lines: list[list[str]], section: Section) -> None:
    """Set the best run of every task in bold, in place."""
    for number, row in enumerate(section.rows, 1):
        for column, task in enumerate([*section.tasks, "average"], 1):
            if task in row.best:
                line, place = (number, column) if is_wide(section) else (column, number)
                lines[line][place] = rf"\textbf{{{lines[line][place]}}}"


LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "’": "'", "–": "--",
    MINUS: "$-$", "±": r"$\pm$", PARTIAL: r"\dag{}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    return "".join(LATEX_SPECIAL.get(character, character) for character in one_line(text))


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)
