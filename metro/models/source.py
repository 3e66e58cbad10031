"""Where a model is to come from, looked at before torch is imported, which takes seconds."""

import os
from pathlib import Path

from metro.models.registry import find_registered, nearest_names
from metro.utils.messages import UserError


def model_source(path_or_name: str | os.PathLike) -> str:
    """A checkpoint, a folder or an id on the hub as it is, a registered name as its id there.

    Raises:
        ValueError: a folder without a model, or neither a path nor a name of that kind.
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
                else "give a Hugging Face folder, or a .pt file of fairseq"
            )
            raise UserError(f"{name} has no config.json, so it is no model: {remedy}")
        return name
    registered = find_registered(name)
    if registered is not None:
        return registered.hub_id
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".pt"):
        return name
    near = nearest_names(name)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"there is no file or folder {name}, and no registered model of that name; {hint}`metro "
        "models` lists the registered ones"
    )


def check_file(path: Path) -> None:
    """Raise a FileNotFoundError where there is no file of that name."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")


def check_model_folder(folder: Path) -> None:
    """Raise a ValueError where there is no Hugging Face folder of that name."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a Hugging Face folder")
