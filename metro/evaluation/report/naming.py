"""What the report calls suites, tasks and runs."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from metro.evaluation.runs.run_folder import Run
from metro.models.registry_cards import SUITE_TITLES, TASK_TITLES

# Of tasks that the registry has no title for, or one that is too long for a table across.
SHORT_TITLES = {
    "winogrande": "Winogrande",
    "story_cloze": "StoryCloze",
    "arc_challenge": "ARC-C",
    "paws": "PAWS",
    "strategyqa": "StrategyQA",
    "winowhy": "WinoWhy",
    "vitaminc_fact_verification": "VitaminC fact verification",
    "imdb": "IMDB",
}


def task_title(task: str) -> str:
    return SHORT_TITLES.get(task) or TASK_TITLES.get(task) or title_case(task)


def suite_title(suite: str, runs: Sequence[Run]) -> str:
    """As the suite calls itself, if its runs say so."""
    return SUITE_TITLES.get(suite) or next((r.title for r in runs if r.title), title_case(suite))


def title_case(name: str) -> str:
    text = re.sub(r"\bus\b", "US", name.replace("_", " ").strip())
    return text[:1].upper() + text[1:]


def model_name(run: Run, titles: Mapping[str, str]) -> str:
    return titles.get(run.registered or "") or run.registered or short_model_name(run.model)


def labels(runs: Sequence[Run], models: Sequence[str], members: Sequence[int]) -> list[str]:
    """Short and different names of the members of a section: the model; its method where the
    report has several methods of it; its folder where that is not enough."""
    methods: dict[str, set[str]] = {}
    for run, model in zip(runs, models, strict=True):
        methods.setdefault(model, set()).add(run.method)
    names = [
        f"{models[number]}, {runs[number].method}" if len(methods[models[number]]) > 1
        else models[number]
        for number in members
    ]  # fmt: skip
    for extra in (lambda run: run.folder.name, lambda run: run.folder):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            f"{name}, {extra(runs[number])}" if name in twice else name
            for name, number in zip(names, members, strict=True)
        ]
    return names


def colours(runs: Sequence[Run], models: Sequence[str], members: Sequence[int]) -> list[int]:
    """Numbers of colours: a model and method have one in the whole report, unless a section has
    them twice."""
    keys = [(model, run.method) for model, run in zip(models, runs, strict=True)]
    order = list(dict.fromkeys(keys))
    found = [order.index(keys[number]) for number in members]
    return found if len(set(found)) == len(found) else list(range(len(members)))


def short_model_name(model: str) -> str:
    """The last part of a path or hub id, with the one before it where it says little alone."""
    path = Path(model.rstrip("/") or model)
    if path.suffix in (".pt", ".bin", ".safetensors") and path.parent.name:
        path = path.parent
    if re.fullmatch(
        r"(?i)direct|channel|flipped|hf|export(ed)?|model|final|(checkpoint.*)", path.name
    ):
        return f"{path.parent.name}/{path.name}".lstrip("/")
    return path.name


def grouped(number: float) -> str:
    """12 345, with narrow spaces."""
    return f"{number:,.0f}".replace(",", "\u202f")


def asset(name: str) -> str:
    """Read a file of the page."""
    path = resources.files("metro.evaluation").joinpath("report/assets", name)
    return path.read_text("utf-8")
