"""Prompt templates in promptsource's form: a tree of ``templates.yaml`` files, and their rendering.

A template is Jinja text: prompt, ``|||``, answer. ``answer_choices`` is Jinja text too; it renders
to the answer choices joined by ``|||`` and is a list inside the template. Every value that a
``{{ ... }}`` prints is cut at 2048 characters, ``|||`` inside data splits nothing, and both parts
are stripped: the same strings as promptsource's, from a sandbox (``sandbox.py``).
"""

import os
import re
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from metro.data.datasets import name_of
from metro.data.prompts.labels import AnswerChoices
from metro.data.prompts.limits import TemplateError
from metro.data.prompts.sandbox import (
    ProtectedRow,
    protect,
    render_source,
    unprotect,
)
from metro.utils.characters import bad_character_in
from metro.utils.messages import UserError, did_you_mean

_MAX_YAML_DEPTH = 20
_MAX_TASK_NAME = 200  # of 255 bytes
_HEADER = re.compile(r"^(dataset|subset):[ \t]*(.+?)[ \t]*$", re.M)
_REMEDY = (
    "give a promptsource tree with --templates DIR (or METRO_TEMPLATES), or run "
    "`metro templates fetch` once"
)


class RenderedExample(NamedTuple):
    """One row under one template, everything from one set of draws."""

    input: str
    """The prompt."""
    target: str | None
    """The answer; None where the template gives this row no answer part."""
    choices: list[str] | None
    """Answer choices; None where the template has none."""
    label: int | None
    """Index of the target among the choices; None where it is not one of them."""
    missing: tuple[str, ...]
    """Fields that the template printed or asked for and the row does not have, or that are null."""
    unlabelled: tuple[str, ...] = ()
    """Values that decide on the answer and are no label, such as ``label is -1``."""
    is_cut: bool = False
    """A value was cut at 2048 characters."""


@dataclass(frozen=True)
class PromptTemplate:
    """One template of one dataset."""

    dataset: str
    subset: str | None
    name: str
    jinja: str
    answer_choices: str | None
    """Jinja text of the answer choices, joined by ``|||``; None where any text may be an answer."""
    metrics: tuple[str, ...] = ()
    original_task: bool = False
    """The task is the one that the dataset was made for."""
    choices_in_prompt: bool | None = None
    reference: str = ""

    @cached_property
    def task_name(self) -> str:
        """Name of this task in the published mixtures: ``dataset[_subset]_template``.

        Everything but letters, digits, ``_`` and ``.`` becomes ``_``. Names that would lose other
        letters or symbols, or are too long for a folder, end with a checksum, which no published
        one does.
        """
        whole = "_".join([self.dataset, *([self.subset] if self.subset else []), self.name])
        name = re.sub(r"[^a-zA-Z0-9_.]+", "_", whole)
        loses = any(not c.isascii() and unicodedata.category(c)[0] not in "PZ" for c in whole)
        if not loses and len(name) <= _MAX_TASK_NAME:
            return name
        return f"{name[:_MAX_TASK_NAME]}_{zlib.crc32(whole.encode('utf-8', 'replace')):08x}"

    def render(self, row: dict, *, seed: int | None = 0) -> RenderedExample:
        """Render prompt, answer and answer choices of a row.

        Args:
            row: the dataset's row.
            seed: of the filter ``choice``; equal seeds draw the same. None takes the first of each
                list.

        Raises:
            TemplateError: the template fails on this row, or is refused.
        """
        with self._named():
            fields = self._fields(row)
            choices, without = self._choices(fields, seed)
            values = self._with_choices(fields, choices)
            rendered = render_source(self.jinja, values, seed)
        parts = [unprotect(part).strip() for part in rendered.text.split("|||")]
        target = parts[1] if len(parts) > 1 else None
        label = None
        if choices and target:
            label = _label_of(target, choices, rendered.used_choices)
        missing = tuple(dict.fromkeys([*rendered.missing, *without]))
        unlabelled = tuple(dict.fromkeys(rendered.unlabelled))
        return RenderedExample(
            parts[0], target, choices, label, missing, unlabelled, rendered.is_cut
        )

    def render_text(self, jinja_source: str, row: dict, *, seed: int | None = 0) -> str:
        """Render any Jinja text as if it were this template's; neither split nor stripped."""
        with self._named():
            fields = self._fields(row)
            values = self._with_choices(fields, self._choices(fields, seed)[0])
            return unprotect(render_source(jinja_source, values, seed).text)

    def _fields(self, row: dict) -> ProtectedRow:
        if isinstance(row, ProtectedRow):
            return row
        if "answer_choices" in row:
            raise TemplateError(
                "cannot render a row with a field 'answer_choices', which in templates means the "
                "answer choices: rename it"
            )
        return ProtectedRow(row)

    def _choices(
        self, fields: ProtectedRow, seed: int | None
    ) -> tuple[list[str] | None, list[str]]:
        """Return the answer choices, and the fields that the row lacks for them."""
        source = self.answer_choices
        if not source:
            return None, []
        key = (source, seed)  # templates of a dataset mostly share their answer choices
        if key not in fields.choices:
            text, missing = source, []
            if "{" in source:
                rendered = render_source(source, fields, seed, cuts=False)
                text, missing = rendered.text, rendered.missing
            choices = [unprotect(part).strip() for part in text.split("|||")]
            fields.choices[key] = choices, missing
        choices, missing = fields.choices[key]
        return list(choices), missing

    @staticmethod
    def _with_choices(fields: dict, choices: list[str] | None) -> dict:
        shown = None if choices is None else AnswerChoices(protect(choices))
        return {**fields, "answer_choices": shown}

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name this template in its errors."""
        try:
            yield
        except TemplateError as error:
            template = (name_of(self.dataset, self.subset), self.name)
            raise TemplateError(error.problem, error.reason, template) from None


def _label_of(target: str, choices: list[str], used: list[int]) -> int | None:
    """Return the index of the answer choice that the target is.

    Equal choices are told apart by the one that the answer part read last. A target that has the
    words of the only choice read among others ("positive review.") is that choice.

    Args:
        used: indices of the choices that the answer part read.
    """
    last = used[-1] if used else None
    if last is not None and target == choices[last]:
        return last
    if target in choices:
        return choices.index(target)
    if last is not None and choices[last] and set(used) == {last}:
        words = rf"(?<!\w){re.escape(choices[last])}(?!\w)"
        return last if re.search(words, target) else None
    return None


class TemplateTree:
    """A folder of ``<dataset>[/<subset>]/templates.yaml`` files; each is read when asked for."""

    def __init__(self, path: str | Path):
        path = Path(path)
        if not any(path.glob("*/templates.yaml")) and (path / "templates").is_dir():
            path = path / "templates"
        if not path.is_dir():
            raise UserError(f"no folder of templates at {path}: {_REMEDY}")
        self.path = path
        self._templates: dict[tuple[str, str | None], dict[str, PromptTemplate]] = {}
        self._damaged: dict[tuple[str, str | None], dict[str, str]] = {}

    @cached_property
    def _files(self) -> dict[tuple[str, str | None], Path]:
        found = {}
        for file in sorted(self.path.rglob("templates.yaml")):
            found[_names_in(file, self.path)] = file
        if not found:
            raise UserError(f"no templates.yaml below {self.path}: {_REMEDY}")
        return found

    def datasets(self) -> list[tuple[str, str | None]]:
        """Return every (dataset, subset) that has templates, sorted."""
        return sorted(self._files, key=lambda names: (names[0], names[1] or ""))

    def templates(self, dataset: str, subset: str | None = None) -> list[PromptTemplate]:
        """Return the templates of a dataset, in the order of the file.

        Raises:
            UserError: the tree has none for it; the message names similar ones.
        """
        return list(self._of(dataset, subset).values())

    def damaged(self, dataset: str, subset: str | None = None) -> dict[str, str]:
        """Return the templates of a dataset that cannot be used -> what is wrong with them."""
        self._of(dataset, subset)
        return self._damaged[dataset, subset]

    def template(self, dataset: str, subset: str | None, name: str) -> PromptTemplate:
        """Return the template of that name.

        Raises:
            UserError: there is none; the message names similar ones.
        """
        named = self._of(dataset, subset)
        if name in self._damaged[dataset, subset]:
            raise UserError(self._damaged[dataset, subset][name])
        if name not in named:
            raise UserError(
                f"{name_of(dataset, subset)} has no template {name!r}: {did_you_mean(name, named)}"
            )
        return named[name]

    def _of(self, dataset: str, subset: str | None) -> dict[str, PromptTemplate]:
        key = (dataset, subset)
        if key not in self._templates:
            if key not in self._files:
                known = [name_of(*names) for names in self.datasets()]
                raise UserError(
                    f"no templates for {name_of(*key)} in {self.path}: "
                    f"{did_you_mean(name_of(*key), known)}"
                )
            damaged: dict[str, str] = {}
            found = read_templates(self._files[key], *key, damaged=damaged)
            self._damaged[key] = damaged
            self._templates[key] = {template.name: template for template in found}
        return self._templates[key]


def _names_in(file: Path, root: Path) -> tuple[str, str | None]:
    """Read dataset and subset from the head of the file, else from its folders."""
    with file.open(encoding="utf-8", errors="replace") as text:
        named = dict(_HEADER.findall(text.read(400)))
    parts = file.parent.relative_to(root).parts
    dataset = named.get("dataset", parts[0] if parts else "").strip("'\"")
    subset = named.get("subset", "" if "dataset" in named else "/".join(parts[1:])).strip("'\"")
    return dataset, subset or None


@lru_cache(maxsize=1)
def _loader():
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """Plain data, and promptsource's two tags, which become plain data as well."""

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    return Loader


def read_templates(
    file: Path,
    dataset: str | None = None,
    subset: str | None = None,
    *,
    damaged: dict[str, str] | None = None,
) -> list[PromptTemplate]:
    """Read one ``templates.yaml``. Only plain data is built: no tag runs code.

    Args:
        file: the file.
        dataset, subset: its names, if known.
        damaged: receives templates that are not of promptsource's form -> what is wrong.

    Raises:
        UserError: the file, or without ``damaged`` a template, is not of promptsource's form.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=_loader()):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_YAML_DEPTH:  # the C loader would overflow its stack
                raise UserError(f"{file} is not a file of templates: it nests too deeply")
        content = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not a file of templates: {reason}") from None
    if not isinstance(content, dict) or not isinstance(content.get("templates"), dict):
        raise UserError(f"{file} is not a file of templates: it has no mapping `templates`")
    dataset = dataset or str(content.get("dataset"))
    subset = subset or content.get("subset") or None
    found: dict[str, PromptTemplate] = {}
    for key, entry in content["templates"].items():
        try:
            template = _read_template(file, key, entry, dataset, subset)
            if found.pop(template.name, None):
                raise UserError(f"{file} has two templates named {template.name!r}: rename one")
        except UserError as error:
            if damaged is None:
                raise
            name = entry.get("name") if isinstance(entry, dict) else None
            damaged[name if isinstance(name, str) else str(key)] = str(error)
            continue
        found[template.name] = template
    return list(found.values())


def _read_template(file: Path, key: Any, entry: Any, dataset: str, subset: str | None):
    where = f"{file}: template {key}"
    for field in ("name", "jinja"):
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            raise UserError(f"{where} has no text `{field}`")
    if found := bad_character_in(entry.values()):
        raise UserError(f"{where} has a text with {found}")
    metadata = entry.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{where} has metadata without fields")
    metrics = metadata.get("metrics") or []
    # Values are not shown: with aliases of YAML a few lines make a value of any length.
    for field, value in (
        ("answer_choices", entry.get("answer_choices") or ""),
        ("reference", entry.get("reference") or ""),
        *(("metrics", metric) for metric in (metrics if isinstance(metrics, list) else [metrics])),
    ):
        if not isinstance(value, str):
            raise UserError(f"{where}: `{field}` is a {type(value).__name__}, not a text")
    in_prompt = metadata.get("choices_in_prompt")
    return PromptTemplate(
        dataset=dataset,
        subset=subset,
        name=entry["name"],
        jinja=entry["jinja"],
        answer_choices=entry.get("answer_choices") or None,
        metrics=tuple(metrics),
        original_task=bool(metadata.get("original_task")),
        choices_in_prompt=None if in_prompt is None else bool(in_prompt),
        reference=entry.get("reference") or "",
    )


def find_templates(path: str | Path | None = None) -> TemplateTree:
    """Open the tree at ``path``, ``$METRO_TEMPLATES`` or the cache of `metro templates fetch`.

    Raises:
        UserError: there is none; the message says what to do.
    """
    from metro.data.prompts.template_download import cached_templates

    for place in (path, os.environ.get("METRO_TEMPLATES"), cached_templates()):
        if place:
            return TemplateTree(place)
    raise UserError(f"no templates: {_REMEDY}")
