"""Identity of what results depend on: digests of contents, whatever their names and places."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from metro.utils.messages import UserError

OF_THE_PLACE = {
    *("_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only"),
    *("dtype", "torch_dtype", "_commit_hash", "auto_map", "added_tokens_decoder"),
}
"""Keys of transformers' settings that do not change what a model computes from its weights."""


def digest(parts: Iterable[Any]) -> str:
    """Digest of bytes, and of values as JSON takes them (others by their ``repr``)."""
    found = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes | memoryview):
            part = json.dumps(part, sort_keys=True, default=repr).encode()
        found.update(len(part).to_bytes(8, "big"))
        found.update(part)
    return found.hexdigest()[:16]


def files_identity(paths: Iterable[Path]) -> str:
    """Digest of what files hold, in their order, whatever their names and times; 1 GB a second."""

    def content(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    return digest(map(content, paths))


def model_identity(model, tokenizer) -> dict[str, str]:
    """Digests of a model's weights and configuration, and of its tokenizer.

    Args:
        model: of Hugging Face; every number of its weights counts, in their type.
        tokenizer: of the model.

    Raises:
        UserError: a weight is NaN or infinite; the message has its name.
    """
    return {
        "configuration": digest([_settings(model.config.to_dict())]),
        "tokenizer": tokenizer_identity(tokenizer),
        "weights": weights_identity(model),
    }


def weights_identity(model) -> str:
    """Digest of every number of a model's weights.

    Raises:
        UserError: one is NaN or infinite; the message has the name of its tensor.
    """
    import torch

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def content(named: tuple[str, Any]) -> str:
        name, tensor = named
        if tensor.is_meta:  # offloaded
            from accelerate.utils import align_module_device

            module, _, leaf = name.rpartition(".")
            owner = model.get_submodule(module)
            with align_module_device(owner):
                return content((name, getattr(owner, leaf)))
        if name in parameters:
            refuse_not_finite(name, tensor, "the model is damaged; use another checkpoint")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return digest([name, list(tensor.shape), str(tensor.dtype), memoryview(raw.numpy())])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return digest(pool.map(content, sorted(model.state_dict().items())))


def refuse_not_finite(name: str, weight, remedy: str) -> None:
    """Raise a ``UserError`` if a weight has a number that is NaN or infinite."""
    import torch

    if weight.numel() and not all(one.isfinite() for one in torch.aminmax(weight.detach())):
        raise UserError(
            f"the weight {name} of the model has numbers that are not finite (NaN or infinity): "
            f"{remedy}"
        )


def tokenizer_identity(tokenizer) -> str:
    """Digest of everything that a tokenizer saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        parts: list[Any] = []
        for path in sorted(Path(folder).iterdir()):
            content = path.read_bytes()
            is_settings = path.name == "tokenizer_config.json"
            parts += [path.name, _settings(json.loads(content)) if is_settings else content]
        return digest(parts)


def _settings(value: Any) -> Any:
    """Leave out what depends on the place, at every depth."""
    if isinstance(value, dict):
        return {str(k): _settings(v) for k, v in value.items() if str(k) not in OF_THE_PLACE}
    return [_settings(each) for each in value] if isinstance(value, list | tuple) else value
