"""Where the weights of a large model go, and in how many bits: ``device_map`` and ``load_in``.

Nothing heavy is imported here: the options stand in the settings of every command that loads.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

from metro.utils.messages import MissingPackage, UserError
from metro.utils.settings import Settings, option

BITS = ("8bit", "4bit")
Memory = dict[int | str, int | str]
"""Device (a GPU's number, ``"cpu"``) -> bytes, or a text such as ``"70GB"``."""


@dataclass(kw_only=True)
class PlacementSettings(Settings):
    """Options of models that are too large for one device."""

    device: str | None = option(
        None, "cpu, cuda, cuda:1; default: a GPU.", section="Model and device"
    )
    device_map: str | None = option(
        None,
        "auto: over the GPUs (under torchrun this process's share), then CPU, then disk.",
        choices=("auto", "balanced", "sequential"),
    )
    load_in: str | None = option(
        None, "Round the weights of linear layers to so many bits.", choices=BITS
    )

    def placed(self, device: Any) -> dict[str, Any]:
        """Return the arguments of `metro.load`, for a model on ``device`` where nothing is said.

        Raises:
            UserError: two options place the model.
        """
        if self.device_map is None:
            return {"device": device, "load_in": self.load_in}
        return {"device": self.device, "device_map": self.device_map, "load_in": self.load_in}


def placement(
    device: Any,
    device_map: str | dict | None,
    load_in: str | None,
    dtype: Any,
    max_memory: Memory | None = None,
) -> dict[str, Any]:
    """Options of ``from_pretrained`` that put each weight where it stays, as it is read.

    Args:
        device: of all weights, or None.
        device_map: a name, or part of the model -> device.
        load_in: ``8bit`` or ``4bit`` (NF4, its constants in 8 bits).
        dtype: what rounded weights are computed in; float32 where it is None.
        max_memory: limits for a ``device_map`` by name; by default what is free.

    Raises:
        UserError: device and device_map are both given, or load_in is another number of bits.
        MissingPackage: accelerate or bitsandbytes is not installed.
    """
    if device is not None and device_map is not None:
        raise UserError(
            f"device {device} and device_map {device_map} both place the model: give one"
        )
    if load_in not in (None, *BITS):
        raise UserError(f"load_in is {load_in!r}; use {' or '.join(BITS)}")
    for name, package, extra in (
        (device_map and f"device_map {device_map}", "accelerate", "train"),
        (load_in and f"load_in {load_in}", "bitsandbytes", "quantize"),
    ):
        if name and importlib.util.find_spec(package) is None:
            raise MissingPackage(name, package, extra)
    options: dict[str, Any] = {}
    if device_map is not None:
        options = {"device_map": device_map}
        if isinstance(device_map, str):
            options["max_memory"] = max_memory or own_share()
    elif device is not None and importlib.util.find_spec("accelerate"):
        options = {"device_map": {"": device}}
    if load_in is not None:
        options["quantization_config"] = _rounding(load_in, dtype)
    return options


def _rounding(load_in: str, dtype: Any):
    """Make transformers' configuration of bitsandbytes."""
    import torch
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says of every call what it casts
    return BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )


def processes_here() -> int:
    """Count torchrun's processes on this machine; 0 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0))


def own_gpus(count: int) -> range:
    """GPUs of this process, of ``count`` of its machine: equal shares of torchrun's processes.

    Raises:
        UserError: there are more processes than GPUs.
    """
    local, processes = int(os.environ.get("LOCAL_RANK", 0)), processes_here() or 1
    size = count // processes
    if count and not size:
        raise UserError(f"{processes} processes share {count} GPUs; start fewer per machine")
    return range(local * size, (local + 1) * size)


def own_share() -> Memory:
    """Free memory of this process's GPUs, the only ones it touches, and its share of the machine's.

    Apple's GPUs have no memory beside the machine's.
    """
    import psutil  # which accelerate brings
    import torch

    rest = "mps" if torch.backends.mps.is_available() else "cpu"
    return {
        **{i: torch.cuda.mem_get_info(i)[0] for i in own_gpus(torch.cuda.device_count())},
        rest: psutil.virtual_memory().available // (processes_here() or 1),
    }


def is_dispatched(model) -> bool:
    """Tell whether hooks move weights or activations between devices while it computes."""
    return hasattr(model, "_hf_hook")


def input_device(model):
    """Return the device of a model's inputs; weights that are offloaded are on none."""
    import torch

    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if device is None else torch.device(device)
