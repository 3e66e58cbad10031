"""`metro report`: run folders in, a folder of tables, figures and one page out."""

import csv
from collections.abc import Sequence
from pathlib import Path

from metro.evaluation.report.comparison import Row, Section, compare
from metro.evaluation.report.figure import standalone
from metro.evaluation.report.page import page, slug
from metro.evaluation.report.tables import latex, markdown, prompts_csv, tasks_csv
from metro.evaluation.runs.published import published_rows
from metro.evaluation.runs.run_folder import read_run
from metro.utils.files import write_text
from metro.utils.messages import UserError, counted, percent


def find_runs(folders: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """The run folders that are meant: a folder of run folders stands for those inside it.

    The folder of an earlier report is passed over, so that `results/*` may hold it.

    Raises:
        ValueError: a folder is not there, or is no run and holds none.
    """
    found = []
    for folder in map(Path, folders):
        if (folder / "run.json").is_file():
            found.append(folder)
            continue
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give run folders that `metro evaluate` wrote")
        if is_report(folder) or (out is not None and folder.resolve() == Path(out).resolve()):
            continue
        inside = sorted(path.parent for path in folder.glob("*/run.json"))
        if not inside:
            raise UserError(
                f"{folder} is not a run folder, nor does it hold one (no run.json); give folders "
                "that `metro evaluate` wrote"
            )
        found += inside
    if not found:
        raise UserError("no run to report on: give the folders that `metro evaluate` wrote")
    return found


def is_report(folder: Path) -> bool:
    return (folder / "report.html").is_file() and (folder / "tasks.csv").is_file()


def build_sections(
    folders: Sequence[str | Path], published: Sequence[str] = ("all",), suite: str | None = None
) -> list[Section]:
    """Read the runs and put them beside published rows, a section per suite."""
    from metro.models.registry import registered_models

    runs = [read_run(folder) for folder in folders]
    suites = list(dict.fromkeys(run.suite for run in runs))
    if suite is not None:
        if suite not in suites:
            raise UserError(f"no run of suite {suite!r}: the runs are of {', '.join(suites)}")
        runs = [run for run in runs if run.suite == suite]
    titles = {name: model.title for name, model in registered_models().items()}
    return compare(runs, published_rows(published), titles)


def average(section: Section, row: Row) -> str:
    """The average of a run for the terminal, and what it is over."""
    if row.average is None:
        return "no task is whole"
    part = "" if row.num_averaged == len(section.tasks) else f"{row.num_averaged} of "
    return f"{percent(row.average)}, over {part}{counted(len(section.tasks), 'task')}"


def default_title(sections: Sequence[Section]) -> str:
    """Models and suites, as far as they fit a heading."""
    models = list(dict.fromkeys(run.model for section in sections for run in section.runs))
    suites = listing([section.title for section in sections])
    if len(models) > 3:
        return f"{len(models)} models on {suites}"
    return f"{listing(models)} on {suites}"


def listing(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def write_report(
    sections: Sequence[Section], out: str | Path, title: str | None = None
) -> list[Path]:
    """Write every format into `out`; each file is whole or not there. Returns the paths.

    Figures of an earlier report in the same folder go if this one has none of their suites.
    """
    title = title or default_title(sections)
    files = {
        "report.md": markdown(title, sections),
        "report.tex": latex(title, sections),
        "tasks.csv": tasks_csv(sections),
        "prompts.csv": prompts_csv(sections),
    }
    for section in sections:
        files[f"{slug(section.suite)}.svg"] = standalone(section)
    files = {"report.html": page(title, sections, list(files)), **files}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in figures_of(out) - files.keys():
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_text(out / name, content)
    return [out / name for name in files]


def figures_of(folder: Path) -> set[str]:
    """The figures that an earlier report wrote, by the suites of its table."""
    if not is_report(folder):
        return set()
    with (folder / "tasks.csv").open(encoding="utf-8", newline="") as file:
        return {f"{slug(row['suite'])}.svg" for row in csv.DictReader(file) if row.get("suite")}
