"""The tensors of a Hugging Face folder, exactly as its files hold them."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from metro.models.safe_loading import load_tensors_and_settings
from metro.utils.messages import UserError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a folder: one file or several, safetensors or ``pytorch_model.bin``.

    Raises:
        ValueError: no weights, or damaged ones.
    """
    folder = Path(folder)
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return read_tensors(path)
        try:
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); copy it again") from None
        missing = [part for part in parts if not (folder / part).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which {name} names")
        tensors = {}
        for part in parts:
            tensors |= read_tensors(folder / part)
        return tensors
    raise UserError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file.

    Raises:
        ValueError: the file is damaged or holds more than tensors.
    """
    if path.suffix != ".safetensors":
        content = load_tensors_and_settings(path)
        if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
            raise UserError(f"{path} does not hold bare weights; is it a checkpoint of fairseq?")
        return content
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from error
