"""Titles of suites, tasks and runs in the report, and the files of its page."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from metro.evaluation.runs.run_folder import Run
from metro.evaluation.settings import GENERIC
from metro.models.registry_cards import SUITE_TITLES, TASK_TITLES
from metro.utils.messages import counted

SHORT_TITLES = {
    "winogrande": "Winogrande",
    "story_cloze": "StoryCloze",
    "arc_challenge": "ARC-C",
    "paws": "PAWS",
    "strategyqa": "StrategyQA",
    "winowhy": "WinoWhy",
    "vitaminc_fact_verification": "VitaminC fact verification",
    "imdb": "IMDB",
    "npi_licensing": "NPI licensing",
}
"""Titles of tasks that the registry has none for, or one too wide for a table."""


def task_title(task: str) -> str:
    return SHORT_TITLES.get(task) or TASK_TITLES.get(task) or title_case(task)


def suite_title(suite: str, runs: Sequence[Run]) -> str:
    """Title that the registry or a run has for a suite, else its name."""
    return SUITE_TITLES.get(suite) or next((r.title for r in runs if r.title), title_case(suite))


def title_case(name: str) -> str:
    text = re.sub(r"\bus\b", "US", name.replace("_", " ").strip())
    return text[:1].upper() + text[1:]


def model_name(run: Run, titles: Mapping[str, str]) -> str:
    return titles.get(run.registered or "") or run.registered or path_title(run.model)


def labels(runs: Sequence[Run], models: Sequence[str], members: Sequence[int]) -> list[str]:
    """Unique labels: the model, plus method, limit or folder if needed to tell runs apart.

    Args:
        runs: of the whole report.
        models: their titles.
        members: indices of the runs of a section.
    """
    methods: dict[str, set[str]] = {}
    for run, model in zip(runs, models, strict=True):
        methods.setdefault(model, set()).add(run.method)
    names = [
        f"{models[n]}, {runs[n].method}" if len(methods[models[n]]) > 1 else models[n]
        for n in members
    ]
    limits = [runs[number].options.get("limit") for number in members]
    if len({*limits}) > 1:
        names = [
            name if limit is None else f"{name}, limit {limit}"
            for name, limit in zip(names, limits, strict=True)
        ]
    for extra in (lambda run: run.folder.name, lambda run: run.folder):
        # All runs of a model, so that none looks like another kind of run.
        twice = {models[n] for name, n in zip(names, members, strict=True) if names.count(name) > 1}
        names = [
            f"{name}, {extra(runs[number])}" if models[number] in twice else name
            for name, number in zip(names, members, strict=True)
        ]
    return names


def colours(runs: Sequence[Run], models: Sequence[str], members: Sequence[int]) -> list[int]:
    """Numbers of colours, one per model and method of the report; see :func:`labels`."""
    keys = [(model, run.method) for model, run in zip(models, runs, strict=True)]
    order = list(dict.fromkeys(keys))
    found = [order.index(keys[number]) for number in members]
    # A section that has a model and method twice numbers its own.
    return found if len(set(found)) == len(found) else list(range(len(members)))


def path_title(model: str) -> str:
    """Last part of a path or hub id, with the one before it if it is a generic name.

    A checkpoint of fairseq (``.pt``), of which a folder may hold several, is called by its stem.
    """
    path = Path(model.rstrip("/") or model)
    if path.suffix == ".pt":
        path = path.with_suffix("")
    if path.suffix in (".bin", ".safetensors") and path.parent.name:
        path = path.parent
    if re.fullmatch(GENERIC, path.name):
        return f"{path.parent.name}/{path.name}".lstrip("/")
    return path.name


def grouped(number: float) -> str:
    """12 345, with narrow spaces."""
    return f"{number:,.0f}".replace(",", "\u202f")


def each_count(numbers: Sequence[int], noun: str) -> str:
    """``1 prompt``, ``5 / 20 examples`` of two runs; of more than three the least and the most."""
    is_few = len(numbers) <= 3
    shown = list(numbers) if is_few else [min(numbers), max(numbers)]
    shown = shown if len(set(shown)) > 1 else shown[:1]
    parts = [*map(grouped, shown[:-1]), counted(shown[-1], noun, grouped)]
    return (" / " if is_few else "–").join(parts)


def asset(name: str) -> str:
    """Read a file of the page."""
    path = resources.files("metro.evaluation").joinpath("report/assets", name)
    return path.read_text("utf-8")
