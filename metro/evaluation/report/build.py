"""`metro report`: tables, figures and one page of evaluations, written from their run folders."""

import base64
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro.evaluation.report.comparison import Row, Section, compare
from metro.evaluation.report.figure import standalone
from metro.evaluation.report.page import page
from metro.evaluation.report.tables import grid, latex, markdown, prompts_csv, tasks_csv
from metro.evaluation.runs.published import published_rows
from metro.evaluation.runs.run_folder import read_run
from metro.evaluation.settings import ReportSettings
from metro.models.registry import registered_models
from metro.utils.files import file_name, link, new_folder
from metro.utils.messages import UserError, counted, percent
from metro.utils.table import Table


@dataclass(frozen=True, repr=False)
class Report:
    """A report that has been written."""

    paths: list[Path]
    """report.html first, then the other files."""
    sections: list[Section]
    """Numbers of every suite, as fractions."""
    left_out: list[Path]
    """Run folders without a result yet."""

    @property
    def tables(self) -> dict[str, Table]:
        """Suite -> its table in percent: runs, differences, published rows, guessing."""
        found = {}
        for section in self.sections:
            header, *rows = grid(section)
            found[section.suite] = Table(header, rows, section.title, section.notes)
        return found

    def __str__(self) -> str:
        """A line per run, and the remarks on them."""
        lines = []
        for section in self.sections:
            for row in section.rows:
                if row.kind == "run":
                    name = row.label if row.says_method else f"{row.label} ({row.detail})"
                    lines.append(f"{section.title}: {name} {average(section, row)}")
            lines += [f"note: {note}" for note in section.notes]
        lines += [f"note: {folder} is left out: no prompt is finished" for folder in self.left_out]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Tables and figures, for a notebook."""
        tables = [table._repr_html_() for table in self.tables.values()]
        drawn = [path.read_bytes() for path in self.paths if path.suffix == ".svg"]
        codes = [base64.b64encode(figure).decode() for figure in drawn]
        figures = [f'<img alt="" src="data:image/svg+xml;base64,{code}">' for code in codes]
        return "\n".join(tables + figures)


def report(runs: ReportSettings | str | Path | Sequence[str | Path], **options: Any) -> Report:
    """Compare runs with each other and with published numbers, and write the report.

    Writes report.html (everything on one page), report.md, report.tex, tasks.csv, prompts.csv, and
    the figure of each suite as SVG.

    Args:
        runs: run folders of `metro.evaluate`, or folders of run folders; or complete settings.
        options: fields of `ReportSettings`, such as ``out`` and ``published``.

    Raises:
        UserError: a folder is not a run, no run is left, or an option is wrong.
    """
    if isinstance(runs, ReportSettings):
        settings = ReportSettings.of(runs, **options)
    else:
        settings = ReportSettings.of(runs=runs, **options)
    found = find_runs(settings.runs, settings.out)
    empty = [folder for folder in found if not read_run(folder).results]
    finished = [folder for folder in found if folder not in empty] or found
    sections = build_sections(finished, settings.published, settings.suite)
    return Report(write_report(sections, settings.out, settings.title), sections, empty)


def find_runs(folders: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Find the run folders: a folder of run folders stands for those inside it.

    The folder of an earlier report is passed over, so that `results/*` may hold it.

    Raises:
        UserError: a folder does not exist, or is not a run and holds none.
    """
    remedy = "give folders that `metro evaluate` wrote"
    found = []
    for folder in map(Path, folders):
        if (folder / "run.json").is_file():
            found.append(folder)
            continue
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; {remedy}")
        if is_report(folder) or (out is not None and folder.resolve() == Path(out).resolve()):
            continue
        inside = sorted(path.parent for path in folder.glob("*/run.json"))
        if not inside:
            raise UserError(
                f"{folder} is not a run folder, nor does it hold one (no run.json); {remedy}"
            )
        found += inside
    if not found:
        raise UserError(f"no run to report on: {remedy}")
    return found


def is_report(folder: Path) -> bool:
    return (folder / "report.html").is_file() and (folder / "tasks.csv").is_file()


def build_sections(
    folders: Sequence[str | Path], published: Sequence[str] = ("all",), suite: str | None = None
) -> list[Section]:
    """Read the runs and compare them with published rows, a section per suite.

    Raises:
        UserError: a run is given twice or has no result, or no run is of the suite.
    """
    runs = [read_run(folder) for folder in folders]
    seen: set[Path] = set()
    for run in runs:
        if not run.results:
            raise UserError(
                f"{run.folder} has no finished prompt yet (results.jsonl is empty or missing): "
                "leave it out, or resume it with `metro evaluate`"
            )
        if run.folder.resolve() in seen:
            raise UserError(f"{run.folder} is given twice: give every run once")
        seen.add(run.folder.resolve())
    suites = list(dict.fromkeys(run.suite for run in runs))
    if suite is not None:
        if suite not in suites:
            raise UserError(f"no run of suite {suite!r}: the runs are of {', '.join(suites)}")
        runs = [run for run in runs if run.suite == suite]
    titles = {name: model.title for name, model in registered_models().items()}
    return compare(runs, published_rows(published), titles)


def average(section: Section, row: Row) -> str:
    """The average of a run for the terminal, and the number of its tasks or paradigms."""
    if row.average is None:
        return "no task is complete"
    part = "" if row.num_averaged == section.num_units else f"{row.num_averaged} of "
    return f"{percent(row.average)}, over {part}{counted(section.num_units, section.averaged_unit)}"


def default_title(sections: Sequence[Section]) -> str:
    """Models and suites, if they fit a heading."""
    models = list(dict.fromkeys(run.model for section in sections for run in section.runs))
    suites = listing([section.title for section in sections])
    return f"{listing(models) if len(models) < 4 else f'{len(models)} models'} on {suites}"


def listing(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def write_report(
    sections: Sequence[Section], out: str | Path, title: str | None = None
) -> list[Path]:
    """Write every format into `out` and return the paths; the folder is the old one or the new one.

    Other files in it stay. Figures of an earlier report are deleted if this one has none of their
    suite.

    Raises:
        UserError: `out` has folders in it or is the working directory, which cannot be replaced.
    """
    title = title or default_title(sections)
    files = {
        "report.md": markdown(title, sections),
        "report.tex": latex(title, sections),
        "tasks.csv": tasks_csv(sections),
        "prompts.csv": prompts_csv(sections),
    }
    for section in sections:
        files[f"{file_name(section.suite)}.svg"] = standalone(section)
    files = {"report.html": page(title, sections, list(files)), **files}
    out = Path(out)
    with new_folder(out, overwrite=True) as folder:
        for path in out.iterdir() if out.is_dir() else ():
            if path.name not in {*files, *figures_of(out)}:
                link(path, folder / path.name)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    return [out / name for name in files]


def figures_of(folder: Path) -> set[str]:
    """Names of the figures that an earlier report wrote, by the suites of its table."""
    if not is_report(folder):
        return set()
    with (folder / "tasks.csv").open(encoding="utf-8", newline="") as file:
        suites = {row.get("suite") for row in csv.DictReader(file)}
        return {f"{file_name(suite)}.svg" for suite in suites if suite}
