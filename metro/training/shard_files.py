"""Sharded checkpoints read without running code in them.

``torch.distributed.checkpoint`` reads its ``.metadata``, and whatever is no tensor, by plain
unpickling. Here the first may name the classes that it is written with, and the second is what
``torch.load(weights_only=True)`` allows.
"""

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from metro.models.reading import DAMAGED, NO_CODE
from metro.utils.messages import UserError

METADATA = ".metadata"
CLASSES = {
    (module.__name__, name): getattr(module, name)
    for module, names in {
        metadata: (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        ),
        filesystem: ("_StorageInfo",),
        torch.serialization: ("_get_layout",),
        torch: ("Size",),
    }.items()
    for name in names
}
PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class _Unpickler(pickle.Unpickler):
    """Builds what describes tensors and where they are, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if found := CLASSES.get((module, name)):
            return found
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.startswith("pathlib") and name in PATHS:
            return PurePath  # where it was written: not used
        raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")


class _Reader(FileSystemReader):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.metadata = read_metadata(folder / METADATA)

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self.metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        try:
            content = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            name = read_item.storage_index.fqn
            reason = " ".join(str(error).split())
            raise UserError(f"{name} of a sharded checkpoint {NO_CODE} ({reason})") from None
        torch.save(content, safe := io.BytesIO())
        safe.seek(0)
        super().load_bytes(read_item, safe)


def read_metadata(path: Path) -> metadata.Metadata:
    """Read what a checkpoint says of its tensors.

    Raises:
        UserError: it names something else, or is damaged.
    """
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} {NO_CODE} ({error})") from None
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None
    if not isinstance(found, metadata.Metadata):
        raise UserError(f"{path} is no sharded checkpoint's; copy it again")
    return found


def load_states(states: dict[str, Any], folder: Path) -> None:
    """Read tensors in place, and other values into the dictionaries; all processes call this.

    Raises:
        UserError: there is more in it than tensors and plain values.
    """
    reader = _Reader(folder)
    try:
        load(states, storage_reader=reader, planner=_Planner())
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
