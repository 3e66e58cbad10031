"""Reading files of others: tensors and settings, never code.

``torch.load(weights_only=True)`` builds tensors and plain containers and refuses everything else
that a pickle can name. Beyond those, checkpoints of fairseq hold their settings in
``argparse.Namespace`` (the original METRO-T0 code) or in omegaconf's containers. Such objects only
store values; nothing else is allowed, and there is no way to load a file without this check.
"""

import argparse
import collections
import pickle
import typing
import zipfile
from pathlib import Path

import torch

from metro.models.source import check_file
from metro.utils.messages import UserError

NO_CODE = "is refused, and nothing in it was run: it does not consist of weights and settings alone"


def allowed_classes() -> list:
    """What a checkpoint may hold beside tensors: the containers that fairseq keeps settings in."""
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
    except ImportError:  # a checkpoint that holds its classes is refused, naming them
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
    """The content of a file written by ``torch.save``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut or of another kind, or holds more than tensors and settings.
    """
    path = Path(path)
    check_file(path)
    # Leaving the context would forbid again what was allowed before it, as by the fairseq plugins.
    already = torch.serialization.get_safe_globals()
    new = [allowed for allowed in allowed_classes() if allowed not in already]
    try:
        with torch.serialization.safe_globals(new):
            # Mapped, not read: an optimizer's state is never touched, and takes no memory.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(explain_refusal(path, error)) from error
    except Exception as error:  # RuntimeError, EOFError, BadZipFile, KeyError, UnicodeDecodeError
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: "
            f"{_first_sentence(error)}): it is cut off or another kind of file; copy it again"
        ) from error


def explain_refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """One line: which class was refused, or that this is no pickle, or a damaged one."""
    reasons = [line.strip() for line in str(error).splitlines() if "nsupported" in line]
    reason = (reasons or [_first_sentence(error)])[0]
    with path.open("rb") as file:
        start = file.read(2)
    # torch's files are zip archives, and long ago pickles of protocol 2.
    if start not in (b"PK", b"\x80\x02") or "nsupported operand" in reason:
        return (
            f"{path} cannot be read as a checkpoint ({reason}): it is another kind of file, or "
            "damaged; nothing in it was run"
        )
    remedy = "Use a checkpoint whose origin you know"
    if "omegaconf" in str(error):
        remedy = "Its settings are omegaconf objects: pip install omegaconf==2.3.0, then try again"
    return f"{path} {NO_CODE} ({reason}). {remedy}"


def _first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(": ")
