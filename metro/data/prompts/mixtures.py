"""Mixtures of prompt tasks: their datasets, rules for templates, and caps of examples per epoch.

The published mixtures are data (``mixtures.yaml``); a file of the same form as one of its entries,
with its datasets written out, is a mixture of your own::

    datasets: [ag_news, super_glue/rte]
    cap: 10000
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from metro.data.datasets import name_of
from metro.data.prompts.templates import PromptTemplate, TemplateTree
from metro.utils.files import read_yaml
from metro.utils.messages import UserError, did_you_mean

_TABLE = Path(__file__).with_name("mixtures.yaml")
_CAPS = ("template", "dataset")
_FORM = {
    **dict.fromkeys(("datasets", "groups", "leave_out", "leave_out_containing"), list),
    **dict.fromkeys(("original_tasks_only", "needs_choices", "fold_whitespace"), bool),
    **dict.fromkeys(("metric", "cap_of", "validation"), str),
    "cap": int,
}
_WORDS = {
    list: "a list of names",
    bool: "true or false",
    str: "a name",
    int: "a number of at least 1",
}


@dataclass(frozen=True)
class Mixture:
    """A selection of prompt tasks."""

    name: str
    datasets: tuple[tuple[str, str | None], ...]
    excluded_tasks: frozenset[str] = frozenset()
    excluded_parts: tuple[str, ...] = ()
    """A task whose name contains one of these is left out."""
    original_tasks_only: bool = False
    metric: str | None = None
    needs_choices: bool = False
    """Only templates with answer choices, and only examples whose answer is one of them."""
    cap: int = 500_000
    cap_of: str = "template"
    fold_whitespace: bool = True
    validation: str | None = None
    """Name of the mixture whose tasks are validated on; None: this one's."""
    validation_only: bool = False

    def reason_to_leave_out(self, template: PromptTemplate) -> str | None:
        """Return why the mixture does not have this template; None if it has it."""
        task = template.task_name
        if task in self.excluded_tasks:
            return "on the published list of tasks left out"
        if any(part in task for part in self.excluded_parts):
            return "its dataset is skipped in validation"
        if self.original_tasks_only and not template.original_task:
            return "not the task its dataset was made for"
        if self.metric and self.metric not in template.metrics:
            return f"its metric is not {self.metric}"
        if self.needs_choices and not template.answer_choices:
            return "no answer choices"
        return None

    def templates(
        self, tree: TemplateTree, dataset: str, subset: str | None
    ) -> list[PromptTemplate]:
        """Return the mixture's templates of one dataset, in the order of the tree."""
        return [
            template
            for template in tree.templates(dataset, subset)
            if self.reason_to_leave_out(template) is None
        ]

    def in_tree(self, tree: TemplateTree) -> "Mixture":
        """Return the mixture with its datasets under the tree's names.

        The text ``Zaid/coqa_expanded`` does not say that it is a dataset without subset.
        """
        known = {name_of(*names): names for names in tree.datasets()}
        found = (known.get(name_of(*names), names) for names in self.datasets)
        return replace(self, datasets=tuple(found))

    def cap_per_template(self, num_templates: int) -> int:
        """Return the most examples of one template in an epoch.

        With ``cap_of: dataset`` it is the dataset's cap, which its templates share.
        """
        return self.cap if self.cap_of == "dataset" else max(1, self.cap // max(1, num_templates))

    def narrowed(self, names: list[str] | None) -> "Mixture":
        """Return the mixture with the named datasets alone (``super_glue/rte``).

        Raises:
            UserError: one of them is not in the mixture; the message names similar ones.
        """
        if not names:
            return self
        known = {name_of(*names): names for names in self.datasets}
        for name in names:
            if name not in known:
                raise UserError(
                    f"mixture {self.name} has no dataset {name!r}: {did_you_mean(name, known)} "
                    f"(`metro prompts list --mixture {self.name}`)"
                )
        chosen = tuple(known[name] for name in known if name in set(names))
        return replace(self, datasets=chosen)


@lru_cache(maxsize=1)
def _table() -> dict:
    return read_yaml(_TABLE)


def mixture_names() -> list[str]:
    return list(_table()["mixtures"])


def find_mixture(name: str | Path) -> Mixture:
    """Find the mixture of that name, or read that YAML file.

    Raises:
        UserError: there is none; the message names the known ones.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return _read_mixture(path)
    wanted = str(name).lower()
    for key, facts in _table()["mixtures"].items():
        if wanted in (key, key.replace("_", "-"), *facts.get("aliases", ())):
            return _build(key, facts)
    raise UserError(
        f"no mixture {str(name)!r}: there are {', '.join(mixture_names())}, or give a FILE.yaml"
    )


def _build(name: str, facts: dict) -> Mixture:
    table = _table()
    facts = dict(facts)
    facts.pop("aliases", None)
    names = [item for group in facts.pop("groups", ()) for item in table["groups"][group]]
    names += facts.pop("datasets", ())
    lists = table["blacklists"]
    excluded = frozenset(x for key in facts.pop("leave_out", ()) for x in lists[key])
    parts = tuple(x for key in facts.pop("leave_out_containing", ()) for x in lists[key])
    datasets = tuple(map(_split_name, dict.fromkeys(names)))
    return Mixture(name, datasets, excluded, parts, **facts)


def _split_name(name: str) -> tuple[str, str | None]:
    dataset, _, subset = name.partition("/")
    return dataset, subset or None


def split_dataset_name(name: str, tree: TemplateTree) -> tuple[str, str | None]:
    """Split ``super_glue/rte`` into dataset and subset, as the tree knows it.

    Raises:
        UserError: the tree has no such dataset; the message names similar ones.
    """
    for known in tree.datasets():
        if name_of(*known) == name:
            return known
    tree.templates(*_split_name(name))  # raises, with similar names
    return _split_name(name)


def _in_one_spelling(path: Path, facts: dict) -> dict:
    """Rename what earlier versions called ``data_sets`` and ``cap_of: data_set``."""
    if "data_sets" in facts and "datasets" in facts:
        raise UserError(f"{path} has datasets and data_sets, which mean the same: join them")
    facts = {"datasets" if key == "data_sets" else key: value for key, value in facts.items()}
    if facts.get("cap_of") == "data_set":
        facts["cap_of"] = "dataset"
    return facts


def _read_mixture(path: Path) -> Mixture:
    if not path.is_file():
        raise UserError(f"no mixture file {path}")
    facts = read_yaml(path)
    if isinstance(facts, dict):
        facts = _in_one_spelling(path, facts)
    if not isinstance(facts, dict) or not (facts.get("datasets") or facts.get("groups")):
        raise UserError(f"{path} names no datasets: write `datasets: [ag_news, ...]`")
    for key, value in facts.items():
        if key not in _FORM:
            hint = did_you_mean(str(key), _FORM)
            raise UserError(f"{path} has an unknown key {key!r}: {hint}")
        is_right = type(value) is _FORM[key]  # `true` is not a number
        if not is_right or (_FORM[key] is list and not all(isinstance(x, str) for x in value)):
            raise UserError(f"{path}: {key} is {value!r}, and must be {_WORDS[_FORM[key]]}")
    if facts.get("cap_of", "template") not in _CAPS:
        raise UserError(f"{path}: cap_of is {facts['cap_of']!r}, and must be one of {_CAPS}")
    if facts.get("cap", 1) < 1:
        raise UserError(f"{path}: cap is {facts['cap']}, and must be {_WORDS[int]}")
    for key in ("groups", "leave_out", "leave_out_containing"):
        known = _table()["groups" if key == "groups" else "blacklists"]
        for name in facts.get(key, ()):
            if name not in known:
                raise UserError(f"{path}: {key} names {name!r}: there are {', '.join(known)}")
    return _build(path.stem, facts)
