"""Suites of evaluation tasks, as data: ``suites/<name>.yaml``, or a file of the user's.

The kinds of a suite, and what its tasks are:

* ``templates`` (default): a dataset, a split and the names of prompt templates;
* ``bigbench``: folders with a ``task.json``;
* ``mmlu``: subjects, all asked with one template;
* ``label_generalization``: a template whose label words are replaced.

A task of your own is a file like this, given as ``--suite colours.yaml``::

    title: Colours
    tasks:
      colour_of:
        data: colours.jsonl        # beside this file; one JSON object per line:
                                   # {"thing": "grass", "colours": ["red", "green"], "answer": 1}
        prompts:
          plain:
            jinja: "What colour is {{thing}}? ||| {{answer_choices[answer]}}"
            answer_choices: "{{colours | join('|||')}}"
          with options:
            jinja: >-
              {{thing}} is {{colours | join(" or ")}}: which? ||| {{answer_choices[answer]}}
            answer_choices: "{{colours | join('|||')}}"
      rte_again:                   # a dataset of the hub (or of --data-dir) works as well,
        dataset: super_glue        # with templates of promptsource by their names
        subset: rte
        split: validation
        prompts: [MNLI crowdsource, must be true]

``|||`` separates prompt and answer, and options from each other. All three methods work with it,
and so do ``--task``, ``--prompt``, ``--limit``, resuming and ``metro report``.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metro.utils.messages import UserError, did_you_mean

FOLDER = Path(__file__).parent.parent / "suites"
KINDS = ("templates", "bigbench", "mmlu", "label_generalization")
WHOLE_TASK = "task.json"
"""Prompt of a BIG-bench task that has no subtasks."""


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite, not loaded yet."""

    name: str
    kind: str
    prompts: tuple[str, ...]
    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    hub: str | None = None
    """Where the dataset is on the hub, if not where ``metro.data.datasets`` knows it."""
    data: Path | None = None
    """A jsonl file instead of a dataset."""
    inline: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Templates written in the suite: ``{name: {"jinja", "answer_choices"}}``."""
    template: dict[str, Any] = field(default_factory=dict)
    """Where the template comes from if not from the dataset: ``{"dataset", "subset", "name"}``."""
    replace_words: dict[str, str] = field(default_factory=dict)
    max_rows: int | None = None


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    name: str
    title: str
    tasks: dict[str, TaskSpec]

    def fingerprint(self) -> str:
        """Of all tasks, so that a file that was changed is told apart; their order is free."""
        specs = (replace(s, data=s.data and s.data.resolve()) for s in self.tasks.values())
        return hashlib.sha256("".join(sorted(map(repr, specs))).encode()).hexdigest()[:16]

    def narrowed(self, tasks: Sequence[str] = (), prompts: Sequence[str] = ()) -> "Suite":
        """The suite with these tasks and prompts only.

        Raises:
            ValueError: a name that the suite does not have, with the nearest ones.
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


def find_suite(name: str) -> Suite:
    """A suite by its name, or from the file of that path.

    Raises:
        ValueError: no such suite; the message has the nearest names.
    """
    path = FOLDER / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no suite file {name}")
    elif not path.is_file():
        raise UserError(
            f"no suite {name!r}: {did_you_mean(name, suite_names())} A file NAME.yaml works as well"
        )
    return read_suite(path)


def read_suite(path: Path) -> Suite:
    """Read a suite file.

    Raises:
        ValueError: it is none, by file, task and field.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict | list):
        raise UserError(f"{path} has no `tasks:`; see the top of metro/evaluation/tasks/suites.py")
    kind = content.get("kind", "templates")
    if kind not in KINDS:
        raise UserError(f"{path}: kind is {kind!r}; use one of {', '.join(KINDS)}")
    tasks: dict[str, TaskSpec] = {}
    for included in content.get("include", ()):
        tasks |= find_suite(included).tasks
    named = content["tasks"]
    for name, entry in named.items() if isinstance(named, dict) else ((n, None) for n in named):
        try:
            tasks[name] = _read_task(name, kind, entry, content, path)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: task {name}: {error} is missing or no value for it") from None
    return Suite(path.stem, str(content.get("title", path.stem)), tasks)


def _read_task(name: str, kind: str, entry: Any, suite: dict, path: Path) -> TaskSpec:
    if kind == "bigbench":
        return TaskSpec(name, kind, tuple(entry or (WHOLE_TASK,)))
    if kind == "mmlu":
        template = dict(suite["template"])
        return TaskSpec(name, kind, (template["name"],), "mmlu", name, suite["split"],
                        hub=suite["hub"], template=template)  # fmt: skip
    if kind == "label_generalization":
        return TaskSpec(
            name, kind, (entry["template"],), entry["dataset"], entry.get("subset"), entry["split"],
            replace_words=dict(entry["replace"]), max_rows=suite.get("max_rows"),
        )  # fmt: skip
    prompts = entry["prompts"]
    inline = prompts if isinstance(prompts, dict) else {}
    for prompt, texts in inline.items():
        for part in ("jinja", "answer_choices"):
            if not isinstance(texts.get(part), str):
                raise UserError(f"{path}: task {name}: prompt {prompt!r} has no text `{part}`")
        if "|||" not in texts["jinja"]:
            raise UserError(
                f"{path}: task {name}: prompt {prompt!r} has no answer: write it behind |||"
            )
    if not prompts:
        raise UserError(f"{path}: task {name} has no prompts")
    if "data" in entry:
        data = path.parent / entry["data"]
        return TaskSpec(name, kind, tuple(prompts), entry.get("dataset", name), data=data,
                        inline=inline)  # fmt: skip
    return TaskSpec(name, kind, tuple(prompts), entry["dataset"], entry.get("subset"),
                    entry["split"], inline=inline)  # fmt: skip
