"""Weights and settings out of files that may come from anybody, without running code in them.

``torch.load(weights_only=True)`` builds tensors and plain containers and refuses everything else
that a pickle can name. Beyond those, fairseq checkpoints keep their settings in
``argparse.Namespace`` (the original METRO-T0 code) or in omegaconf's containers. These only store
values; nothing else is allowed, and no function here loads a file without this check.
"""

import argparse
import collections
import json
import pickle
import struct
import typing
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from metro.models.source import check_file
from metro.utils.checksums import check_archive
from metro.utils.files import inside, read_json
from metro.utils.messages import UserError, install_command, shortened

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NO_CODE = "is refused, and nothing in it was run: it does not consist of weights and settings alone"
MOST_NAMES = 60
"""Tensor names listed per kind of mistake; further ones are counted."""
DAMAGED = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)
"""Errors of ``torch.load`` for bytes that are not what it writes."""


def allowed_classes() -> list:
    """Classes that a checkpoint may name beside tensors: the containers of fairseq's settings."""
    classes = [
        argparse.Namespace,
        collections.OrderedDict,
        collections.defaultdict,
        dict,
        list,
        tuple,
        set,
        int,
        typing.Any,
    ]
    try:
        from omegaconf import DictConfig, ListConfig, base, nodes
    except ImportError:  # a checkpoint that names its classes is refused, naming them
        return classes
    return classes + [
        DictConfig,
        ListConfig,
        base.ContainerMetadata,
        base.Metadata,
        nodes.AnyNode,
        nodes.StringNode,
        nodes.IntegerNode,
        nodes.FloatNode,
        nodes.BooleanNode,
    ]


def load_tensors_and_settings(path: str | Path):
    """Read a file written by ``torch.save``, onto the CPU.

    Raises:
        UserError: no such file; it is truncated or of another kind; or it holds more than tensors
            and settings.
    """
    path = Path(path)
    check_file(path)
    # Leaving the context would forbid again what was allowed before it, as by the fairseq plugins.
    already = torch.serialization.get_safe_globals()
    new = [allowed for allowed in allowed_classes() if allowed not in already]
    with path.open("rb") as file:
        # Mapped, not read: the optimizer state is never touched and takes no memory.
        mapped = file.read(2) == b"PK"
    try:
        if mapped:
            check_archive(path)
        with torch.serialization.safe_globals(new):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(explain_refusal(path, error)) from error
    except DAMAGED as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: "
            f"{_first_sentence(error)}): it is truncated or another kind of file; copy it again"
        ) from error


def explain_refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Say in one line which class was refused, or that the file is not a checkpoint."""
    reasons = [line.strip() for line in str(error).splitlines() if "nsupported" in line]
    reason = (reasons or [_first_sentence(error)])[0]
    with path.open("rb") as file:
        start = file.read(2)
    # torch writes zip archives; before version 1.6, pickles of protocol 2.
    if start not in (b"PK", b"\x80\x02") or "nsupported operand" in reason:
        return (
            f"{path} cannot be read as a checkpoint ({reason}): it is another kind of file, or "
            "damaged; nothing in it was run"
        )
    remedy = "Use a checkpoint from a source you trust"
    if "omegaconf" in str(error):
        remedy = f"Its settings are omegaconf objects: {install_command('fairseq-needs')}"
    return f"{path} {NO_CODE} ({reason}). {remedy}"


def _first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(": ")


def read_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read all weights of a Hugging Face folder, from one file or several, names as stored.

    Raises:
        UserError: no weights, or damaged ones.
    """
    folder = Path(folder)
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return read_tensors(path)
        tensors: dict[str, torch.Tensor] = {}
        for part in shards(path):
            tensors |= read_tensors(part)
        return tensors
    raise UserError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}")


def shards(index: Path) -> list[Path]:
    """List the weight files that an index names, which all are in its folder.

    Raises:
        UserError: it is damaged, or names a file that is missing or elsewhere.
    """
    folder = index.parent
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [inside(folder, name) for name in names]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error}); copy it again") from None
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return parts


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of one file.

    Raises:
        UserError: the file is damaged or holds more than tensors.
    """
    if path.suffix != ".safetensors":
        content = load_tensors_and_settings(path)
        if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
            raise UserError(f"{path} does not hold bare weights; is it a fairseq checkpoint?")
        return content
    check_header(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_readable(folder: Path) -> None:
    """Raise a ``UserError`` for the first file of a folder that is not what its name says."""
    for path in sorted(folder.glob("*.json")):
        read_json(path)
    for path in sorted(folder.glob("*.safetensors")):
        check_header(path)


def check_header(path: Path) -> None:
    """Raise a ``UserError`` if a safetensors file is cut or its header damaged."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from error


def expected_shapes(model_class, *arguments) -> dict[str, torch.Size]:
    """List the names and shapes of a model's tensors, without allocating them."""
    with torch.device("meta"):
        model = model_class(*arguments)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_weights(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], source: str, model: str
) -> None:
    """Check that a model's tensors are all there, with the right shapes.

    Args:
        state: the tensors that were found.
        expected: names and shapes that the model has.
        source: the file or folder, for the message.
        model: the model the weights should belong to, for the message.

    Raises:
        UserError: lists all missing, unexpected and wrongly shaped tensors at once.
    """
    refuse_weights(
        missing=[name for name in expected if name not in state],
        unexpected=[name for name in state if name not in expected],
        wrong_shapes=[
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name])}"
            for name, tensor in state.items()
            if name in expected and tensor.shape != expected[name]
        ],
        source=source,
        model=model,
    )


def refuse_weights(
    missing: Iterable[str],
    unexpected: Iterable[str],
    wrong_shapes: Iterable[str],
    source: str,
    model: str,
) -> None:
    """Raise a ``UserError`` if any of the three lists has an entry."""
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong_shapes}
    listed = {kind: shortened(names, MOST_NAMES) for kind, names in kinds.items()}
    if any(listed.values()):
        text = "; ".join(f"{kind}: {names}" for kind, names in listed.items() if names)
        raise UserError(
            f"the weights in {source} are not those of {model}; {text}. The settings or the "
            "weights belong to another model, or the file is incomplete: take both from the same "
            "source"
        )
