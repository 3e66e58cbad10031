"""Suites of evaluation tasks: ``suites/<name>.yaml``, a YAML file of your own, a prepared folder.

How to write a task of your own, and all keys of a suite: "Own tasks" in ``docs/evaluation.md``. In
short, for ``--suite colours.yaml``::

    title: Colours
    tasks:
      colour_of:
        data: colours.jsonl        # beside this file; one JSON object per line:
                                   # {"thing": "grass", "colours": ["red", "green"], "answer": 1}
        prompts:
          plain:
            jinja: "What colour is {{thing}}? ||| {{answer_choices[answer]}}"
            answer_choices: "{{colours | join('|||')}}"
      rte_again:                   # a dataset of the hub (or of --data-dir), with templates of
        dataset: super_glue        # promptsource by their names
        subset: rte
        split: validation
        prompts: [MNLI crowdsource, must be true]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metro.data.datasets import name_of
from metro.utils.files import read_yaml
from metro.utils.messages import UserError, did_you_mean

FOLDER = Path(__file__).parent.parent / "suites"
KINDS = ("templates", "bigbench", "mmlu", "label_generalization", "minimal_pairs", "prepared")
WHOLE_TASK = "task.json"
"""Prompt of a BIG-bench task that has no subtasks."""
_HELP = 'see "Own tasks" in docs/evaluation.md'
_KEYS = {
    "templates": ("dataset", "subset", "split", "data", "prompts"),
    "label_generalization": ("dataset", "subset", "split", "template", "replace"),
}
_SUITE_KEYS = tuple("title kind include tasks dataset hub split template max_rows folder".split())
_NAMES = {str: "a text", dict: "a mapping", list: "a list", int: "a whole number"}
_NAMES |= {float: "a number"}


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite, not loaded yet."""

    name: str
    kind: str
    prompts: tuple[str, ...]
    dataset: str = ""
    subset: str | None = None
    split: str = ""
    hub: str | None = None
    """Name of the dataset on the hub, if ``metro.data.datasets`` does not know it."""
    data: Path | None = None
    """Rows instead of a dataset: a file or a folder of ``save_to_disk``; of kind ``prepared`` the
    prepared folder."""
    rows: Sequence[dict] | None = None
    """Rows that are open already, instead of a dataset."""
    inline: dict[str, dict[str, str]] = field(default_factory=dict)
    """Templates written in the suite: ``{name: {"jinja", "answer_choices"}}``."""
    template: dict[str, Any] = field(default_factory=dict)
    """Place of the template, if not at the dataset: ``{"dataset", "subset", "name"}``."""
    replace_words: dict[str, str] = field(default_factory=dict)
    max_rows: int | None = None


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    name: str
    title: str
    tasks: dict[str, TaskSpec]

    @property
    def is_of_pairs(self) -> bool:
        """True if its examples are minimal pairs, which have scoring methods of their own."""
        return any(spec.kind == "minimal_pairs" for spec in self.tasks.values())

    def narrowed(self, tasks: Sequence[str] = (), prompts: Sequence[str] = ()) -> "Suite":
        """Return the suite with these tasks and prompts only.

        Raises:
            UserError: the suite does not have one of the names; the message has similar ones.
        """
        for name in tasks:
            if name not in self.tasks:
                raise UserError(
                    f"suite {self.name} has no task {name!r}: {did_you_mean(name, self.tasks)}"
                )
        chosen = {name: spec for name, spec in self.tasks.items() if not tasks or name in tasks}
        known = {prompt for spec in chosen.values() for prompt in spec.prompts}
        for name in prompts:
            if name not in known:
                raise UserError(f"no task here has a prompt {name!r}: {did_you_mean(name, known)}")
        if prompts:
            chosen = {
                name: replace(spec, prompts=tuple(p for p in spec.prompts if p in prompts))
                for name, spec in chosen.items()
            }
        return replace(self, tasks={name: s for name, s in chosen.items() if s.prompts})


def suite_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_suite(name: str, included_by: tuple[Path, ...] = ()) -> Suite:
    """Find a suite by its name, by the path of its YAML file, or by that of a prepared folder.

    Args:
        name: of the suite.
        included_by: files of the suites that include it, from the outermost on.

    Raises:
        UserError: no such suite; the message has similar names.
    """
    if name in suite_names():
        return read_suite(FOLDER / f"{name}.yaml", included_by)
    path = Path(name)
    if path.is_dir():
        return prepared_suite(path)
    if path.suffix not in (".yaml", ".yml"):
        hint = did_you_mean(name, suite_names())
        raise UserError(
            f"no suite {name!r}: {hint}{'' if hint.endswith('?') else '.'} A file NAME.yaml or a "
            "folder of `metro prepare-prompts` works as well"
        )
    if not path.is_file():
        raise UserError(f"no suite file {name}")
    return read_suite(path, included_by)


def read_suite(path: Path, included_by: tuple[Path, ...] = ()) -> Suite:
    """Read a suite file; its form is at the top of the module.

    Raises:
        UserError: it is not a suite; the message names file, task and key.
    """
    content = read_yaml(path)
    where = str(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a suite: it has no `tasks:`; {_HELP}")
    _check_keys(content, _SUITE_KEYS, where)
    kind = _get(content, "kind", str, where, "templates")
    if kind not in KINDS:
        raise UserError(f"{path}: kind is {kind!r}; use one of {', '.join(KINDS)}")
    title = str(_get(content, "title", (str, int, float), where, path.stem))
    if kind == "prepared":
        folder = path.parent / _get(content, "folder", str, where)
        suite = prepared_suite(folder).narrowed(_texts(content, "tasks", where, []))
        return replace(suite, name=path.stem, title=title)
    tasks: dict[str, TaskSpec] = {}
    chain = (*included_by, path.resolve())
    if chain[-1] in included_by:
        raise UserError(f"{' includes '.join(each.name for each in chain)}: a suite in itself")
    for included in _texts(content, "include", where, []):
        tasks |= find_suite(included, chain).tasks
    named = content.get("tasks")
    if not named or not isinstance(named, dict | list):
        raise UserError(f"{path} has no `tasks:`; {_HELP}")
    if isinstance(named, list):
        named = dict.fromkeys(_texts(content, "tasks", where))
    for name, entry in named.items():
        tasks[name] = _read_task(name, kind, entry, content, path)
    return Suite(path.stem, title, tasks)


def _read_task(name: Any, kind: str, entry: Any, suite: dict, path: Path) -> TaskSpec:
    where = f"{path}: task {name}"
    if not isinstance(name, str):
        raise UserError(f"{where}: the name must be a text; quote it")
    if kind == "bigbench":
        prompts = _texts({"subtasks": entry or [WHOLE_TASK]}, "subtasks", where)
        return TaskSpec(name, kind, tuple(prompts))
    if kind == "minimal_pairs":
        dataset, split = (_get(suite, key, str, str(path)) for key in ("dataset", "split"))
        hub = _get(suite, "hub", str, str(path), None)
        prompts = _texts({"paradigms": entry}, "paradigms", where)
        return TaskSpec(name, kind, tuple(prompts), dataset, split=split, hub=hub)
    if kind == "mmlu":
        template = _get(suite, "template", dict, str(path))
        split, hub = (_get(suite, key, str, str(path)) for key in ("split", "hub"))
        prompt = _get(template, "name", str, f"{path}: template")
        return TaskSpec(name, kind, (prompt,), "mmlu", name, split, hub, template=template)
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {entry!r}, and must be a mapping; {_HELP}")
    _check_keys(entry, _KEYS[kind], where)
    subset = _get(entry, "subset", str, where, None)
    if kind == "label_generalization":
        words = _get(entry, "replace", dict, where)
        if not all(isinstance(word, str) for pair in words.items() for word in pair):
            raise UserError(
                f"{where}: replace is {words!r}, and must map texts to texts; quote them"
            )
        dataset, split, prompt = (
            _get(entry, key, str, where) for key in ("dataset", "split", "template")
        )
        max_rows = _get(suite, "max_rows", int, str(path), None)
        if max_rows is not None and max_rows < 1:
            raise UserError(f"{path}: max_rows is {max_rows}; use 1 or more")
        return TaskSpec(
            name, kind, (prompt,), dataset, subset, split, replace_words=words, max_rows=max_rows
        )
    inline = _get(entry, "prompts", (list, dict), where)
    prompts = _texts({"prompts": list(inline)}, "prompts", where)
    if not prompts:
        raise UserError(f"{where} has no prompts")
    inline = inline if isinstance(inline, dict) else {}
    for prompt, texts in inline.items():
        if not isinstance(texts, dict):
            raise UserError(f"{where}: prompt {prompt!r} is {texts!r}, and must be a mapping")
        for part in ("jinja", "answer_choices"):
            _get(texts, part, str, f"{where}: prompt {prompt!r}")
        if "|||" not in texts["jinja"]:
            raise UserError(f"{where}: prompt {prompt!r} has no answer: write it behind |||")
    if "data" in entry:
        data = path.parent / _get(entry, "data", str, where)
        dataset = _get(entry, "dataset", str, where, name)
        split = _get(entry, "split", str, where, "")
        return TaskSpec(
            name, kind, tuple(prompts), dataset, subset, split, data=data, inline=inline
        )
    dataset, split = (_get(entry, key, str, where) for key in ("dataset", "split"))
    return TaskSpec(name, kind, tuple(prompts), dataset, subset, split, inline=inline)


def prepared_suite(folder: Path) -> Suite:
    """Make a suite of a folder of prepared prompts: its held-out datasets are the tasks.

    Prompts are the templates with answer choices. The name is ``prepared-<folder>``, so that no
    folder passes for a suite of METRO.

    Raises:
        UserError: the folder holds no text, or no held-out examples with answer choices.
    """
    from metro.data.prompts.stored import PromptedExamples, read_manifest

    manifest = read_manifest(folder)
    if manifest["format"] != "jsonl":
        raise UserError(f"{folder} holds ids: prepare it with --format jsonl to evaluate on it")
    prompts: dict[tuple[str, str | None], list[str]] = {}
    for task, facts in manifest["splits"].get("valid", {}).items():
        try:
            first = PromptedExamples(folder / "valid" / task / "valid.jsonl")[0]
        except (
            UserError,
            IndexError,
        ):  # damaged: named when it is loaded, and the others are evaluated
            first = {"answer_choices": True}
        if first.get("answer_choices"):  # as for all examples of the template
            key = facts["dataset"], facts["subset"]
            prompts.setdefault(key, []).append(facts["prompt_name"])
    if not prompts:
        raise UserError(
            f"{folder} has no held-out examples with answer choices: prepare it with "
            "--validation all"
        )
    tasks = {
        name_of(*key): TaskSpec(
            name_of(*key), "prepared", tuple(names), *key, split="valid", data=folder
        )
        for key, names in prompts.items()
    }
    name = folder.resolve().name
    return Suite(f"prepared-{name}", f"{name} (prepared, mixture {manifest['mixture']})", tasks)


_REQUIRED = object()


def _get(
    entry: dict, key: str, kind: type | tuple[type, ...], where: str, default: Any = _REQUIRED
) -> Any:
    """Return a value of an entry after checking its type; ``where`` names the entry."""
    value = entry.get(key)
    if value is None and default is _REQUIRED:
        raise UserError(f"{where}: missing key {key!r}; {_HELP}")
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(_NAMES[each] for each in kinds)
        quoted = "; quote it" if kind is str and not isinstance(value, dict | list) else ""
        raise UserError(f"{where}: {key} is {value!r}, and must be {names}{quoted}")
    return value


def _texts(entry: dict, key: str, where: str, default: Any = _REQUIRED) -> list[str]:
    found = _get(entry, key, list, where, default)
    for value in found:
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} has {value!r}, and must be a list of texts; quote it")
        if found.count(value) > 1:
            raise UserError(f"{where}: {key} names {value!r} twice")
    return found


def _check_keys(entry: dict, known: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
