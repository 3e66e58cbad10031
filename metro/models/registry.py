"""The released checkpoints that METRO knows by name, and their model cards.

The facts are in ``checkpoints/registry.yaml``; a wheel carries it as ``metro/checkpoints/``.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metro.utils.files import read_yaml
from metro.utils.messages import UserError, did_you_mean

METHODS = ("direct", "channel", "flipped")
SUITES = ("t0", "flipped14", "bigbench", "label_generalization", "mmlu", "blimp")
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
    config: dict[str, Any]
    """Sizes, by the names of its ``config.json``."""
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
    """Read every released checkpoint, by its name."""
    content = read_yaml(registry_folder() / "registry.yaml")
    return {
        name: RegisteredModel(name=name, **{**fields, "published": tuple(fields["published"])})
        for name, fields in content["models"].items()
    }


def known_config(name: str) -> dict[str, Any] | None:
    """Return the sizes of a registered model, or of one that a configuration begins from."""
    registered = find_registered(name)
    if registered is not None:
        return registered.config
    return read_yaml(registry_folder() / "registry.yaml")["bases"].get(name)


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
