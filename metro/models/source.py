"""Paths and names of models, checked before torch is imported, which takes seconds."""

import os
from pathlib import Path

from metro.models.registry import find_registered, suggest
from metro.utils.messages import UserError


def model_source(path_or_name: str | os.PathLike) -> str:
    """Return a checkpoint, folder or hub id unchanged, and the hub id of a registered name.

    Raises:
        UserError: a folder without a model, or neither a path nor a name of that kind.
    """
    name = os.fspath(path_or_name)
    path = Path(name)
    if path.is_file():
        return name
    if path.is_dir():
        if not (path / "config.json").is_file():
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


def check_file(path: Path) -> None:
    """Raise a ``UserError`` unless ``path`` is a file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        raise UserError(f"there is no file {path}")


def check_model_folder(folder: Path) -> None:
    """Raise a ``UserError`` unless ``folder`` has a ``config.json``."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a Hugging Face folder")
