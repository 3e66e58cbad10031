"""The released checkpoints that METRO knows by name, and their model cards.

The facts are in ``checkpoints/registry.yaml``; a wheel carries it as ``metro/checkpoints/``.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metro.utils.messages import UserError, did_you_mean

FAMILIES = ("metro", "t0", "flipped")
METHODS = ("direct", "channel", "flipped")
SUITES = ("t0", "flipped14", "bigbench", "label_generalization", "mmlu")
_PACKAGE = Path(__file__).resolve().parent.parent
# Installed, then in a checkout.
_FOLDERS = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")


@dataclass(frozen=True)
class RegisteredModel:
    """A released checkpoint."""

    name: str
    """Name in METRO."""
    title: str
    """Name in its paper."""
    hub_id: str
    """Its repository on the Hugging Face Hub."""
    family: str
    """``metro``, ``t0`` or ``flipped``: decides how inputs are built."""
    parameters: int
    """Number of weights, shared ones counted once."""
    vocabulary: str
    pretraining: str
    """Pretraining objective and data."""
    finetuning: str
    """Finetuning data."""
    method: str
    """Evaluation method: ``direct``, ``channel`` or ``flipped``."""
    paper: str
    licence: str
    published: tuple[dict[str, Any], ...]
    """``{"suite", "source", "results": {task: accuracy in percent}}``; reports compare the
    checkpoint with the first one of a suite."""

    def __post_init__(self):
        for field, known in (("family", FAMILIES), ("method", METHODS)):
            if getattr(self, field) not in known:
                raise UserError(f"{field} is {getattr(self, field)!r}; use one of {known}")
        if not isinstance(self.parameters, int) or self.parameters <= 0:
            raise UserError(f"parameters is {self.parameters!r}; use a positive whole number")
        for table in self.published:
            if set(table) != {"suite", "source", "results"}:
                found = ", ".join(sorted(table))
                raise UserError(f"a table of published has {found}; use suite, source, results")
            if table["suite"] not in SUITES:
                raise UserError(f"suite is {table['suite']!r}; use one of {SUITES}")
            for task, accuracy in table["results"].items():
                if not isinstance(accuracy, int | float) or not 0 <= accuracy <= 100:
                    raise UserError(f"{table['suite']} {task} is {accuracy!r}; use percent")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def registry_folder() -> Path:
    """Find the folder with ``registry.yaml`` and the model cards."""
    for folder in _FOLDERS:
        if (folder / "registry.yaml").is_file():
            return folder
    raise UserError(f"no registry.yaml in {' or '.join(map(str, _FOLDERS))}: reinstall METRO")


@functools.cache
def registered_models() -> dict[str, RegisteredModel]:
    """Return every released checkpoint by its name."""
    return read_registry(registry_folder() / "registry.yaml")


def read_registry(path: str | Path) -> dict[str, RegisteredModel]:
    """Read a registry file.

    Raises:
        UserError: it is not a registry, or an entry is wrong, named by file and entry.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise UserError(f"{path} has no `models:` with an entry per model")
    models: dict[str, RegisteredModel] = {}
    for name, fields in content["models"].items():
        try:
            fields = {**fields, "published": tuple(fields.get("published") or ())}
            models[name] = RegisteredModel(name=name, **fields)
        except (TypeError, ValueError) as error:
            message = str(error).replace("RegisteredModel.__init__() ", "")
            raise UserError(f"{path}: {name}: {message}") from None
    hub_ids = [model.hub_id for model in models.values()]
    for hub_id in hub_ids:
        if hub_ids.count(hub_id) > 1:
            raise UserError(f"{path}: hub_id {hub_id} is given to more than one model")
    return models


def find_registered(name: str) -> RegisteredModel | None:
    """Return the entry of a registered name or hub id, ``None`` if there is none."""
    models = registered_models()
    if name in models:
        return models[name]
    return next((model for model in models.values() if model.hub_id == name), None)


def registered_model(name: str) -> RegisteredModel:
    """Return the entry of a registered name or hub id.

    Raises:
        UserError: it is neither; the message suggests the most similar names.
    """
    model = find_registered(name)
    if model is None:
        raise UserError(f"no registered model is called {name!r}; {suggest(name)}")
    return model


def suggest(name: str) -> str:
    """Suggest registered names similar to ``name``, as papers and the hub spell them too."""
    plain = name.rsplit("/", 1)[-1].replace("-", "_").replace("+", "p")
    return did_you_mean(plain, registered_models(), cutoff=0.6)


def show_parameters(count: int) -> str:
    """Format a number of parameters: 225618432 as ``226 M``, 2849757184 as ``2.85 B``."""
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
