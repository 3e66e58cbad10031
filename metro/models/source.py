"""Paths and names of models, checked before torch is imported, which takes seconds."""

import os
from pathlib import Path

from metro.models.registry import METHODS, find_registered, suggest
from metro.sharding import SHARDS
from metro.utils.checksums import RECORD, refuse_damage
from metro.utils.files import read_json
from metro.utils.messages import UserError

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter of PEFT; it names the base model."""

EDITED = ("config.json", "generation_config.json", "tokenizer_config.json", "training.json")
"""Files of a model that people change; ``metro doctor`` compares them, too."""

SCORING_METHOD = "scoring_method"
"""Field of ``generation_config.json``: the method that ``metro finetune`` trained the model for."""

ANSWER_CHOICES = "answer_choices"
"""Another one: those of each target, where it was finetuned on own rows."""


def model_source(path_or_name: str | os.PathLike, above: tuple[Path, ...] = ()) -> str:
    """Return a checkpoint, folder or hub id unchanged, and the hub id of a registered name.

    Args:
        path_or_name: what the user calls the model.
        above: folders of the adapters that name it as their base model.

    Raises:
        UserError: a folder without a model, or neither a path nor a name of that kind.
    """
    name = os.fspath(path_or_name)
    path = Path(name)
    if path.is_file():
        return name
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            adapter_base(path, above)
        elif (path / SHARDS).is_dir():
            raise UserError(
                f"{name} holds the parts of several processes: join them first, with `metro "
                f"convert to-hf {name} --out MODEL`"
            )
        elif not (path / "config.json").is_file():
            checkpoints = sorted(found.name for found in path.glob("checkpoint*.pt"))
            remedy = (
                f"give one of its checkpoints, such as {path / checkpoints[-1]}"
                if checkpoints
                else "give a Hugging Face folder, or a fairseq checkpoint (.pt)"
            )
            raise UserError(f"{name} has no config.json, so it is not a model: {remedy}")
        return name
    registered = find_registered(name)
    if registered is not None:
        return registered.hub_id
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".pt"):
        return name
    raise UserError(
        f"there is no file or folder {name}, and no registered model of that name (`metro models` "
        f"lists them); {suggest(name)}"
    )


def adapter_base(folder: Path, above: tuple[Path, ...] = ()) -> str:
    """Return the base model of an adapter: a path, a hub id or a registered name.

    A relative path counts from the working directory, or from the adapter's folder.

    Raises:
        UserError: there is no such model, the folder holds a whole model too, or the adapter is
            among those ``above`` it.
    """
    if folder.resolve() in above:
        raise UserError(f"{folder} again: an adapter cannot be its own base model")
    file = folder / ADAPTER_CONFIG
    settings = read_json(file)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base.strip():
        raise UserError(f"{file} names no base model: write it as base_model_name_or_path")
    whole = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")]
    if whole:
        raise UserError(
            f"{folder} holds a whole model ({whole[0].name}) and an adapter: move one of them to "
            "another folder"
        )
    if not Path(base).exists() and (folder / base).exists():
        base = str(folder / base)
    try:
        model_source(base, (*above, folder.resolve()))
    except UserError as error:
        raise UserError(f"{file}, base_model_name_or_path: {error}") from None
    return base


def check_file(path: Path) -> None:
    """Raise a ``UserError`` unless ``path`` is a file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        raise UserError(f"there is no file {path}")


def check_as_written(folder: Path) -> None:
    """Refuse damaged files of a model that METRO wrote; those that people edit are not read.

    Nor are optimizer states. What is missing is named by who needs it.
    """
    names = {path.name for path in folder.glob("*") if path.suffix not in (".py", ".pt", ".pth")}
    names -= {*EDITED}
    remedy = f"copy it again (if it was replaced on purpose, delete {folder / RECORD})"
    refuse_damage(folder, names, remedy=remedy, most_bytes=None)


def check_model_folder(folder: Path) -> None:
    """Raise a ``UserError`` unless ``folder`` has a ``config.json``."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} is an adapter: merge it into its base model first, with `metro convert "
            f"to-hf {folder} --out MODEL`"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a Hugging Face folder")


def trained_method(model: str | os.PathLike) -> str | None:
    """Return the scoring method that a model was trained for.

    Args:
        model: registered name, hub id, folder or checkpoint.

    Returns:
        None where neither the registry nor the folder says.

    Raises:
        UserError: the folder says one that there is not.
    """
    if registered := find_registered(os.fspath(model)):
        return registered.method
    file, settings = _generation_settings(model)
    method = settings.get(SCORING_METHOD)
    if method not in (None, *METHODS):
        raise UserError(f"{file}: {SCORING_METHOD} is {method!r}; use {', '.join(METHODS)}")
    return method


def trained_choices(model: str | os.PathLike) -> dict[str, list[str]]:
    """Return the answer choices that a model was finetuned with on own rows: target -> choices.

    Raises:
        UserError: the folder has something else in their place.
    """
    file, settings = _generation_settings(model)
    choices = settings.get(ANSWER_CHOICES) or {}
    lists = [*choices.values()] if isinstance(choices, dict) else [None]
    if not all(isinstance(each, list) and all(isinstance(c, str) for c in each) for each in lists):
        raise UserError(f"{file}: {ANSWER_CHOICES} is {choices!r}; use {{field: [choices]}}")
    return choices


def _generation_settings(model: str | os.PathLike) -> tuple[Path, dict]:
    file = Path(model) / "generation_config.json"
    settings = read_json(file) if os.path.isfile(file) else None  # also of names too long for one
    return file, settings if isinstance(settings, dict) else {}
