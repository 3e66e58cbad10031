"""The recorded numbers and models of ``tests/golden``, unpacked into the layout they were made in.

``tests/golden/README.md`` says what each file is.
"""

import gzip
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

PACKED = Path(__file__).parent / "golden"
ORIGINAL = Path(os.environ.get("METRO_TESTDATA", PACKED.parents[2] / "shared")) / "golden"
"""The whole recording, of which ``tests/golden`` is a part; it need not be there."""


class Golden:
    """Recorded files: ``golden / "masking.json"`` is the path of one.

    A file that ``tests/golden`` lacks is taken from the whole recording; where that is absent the
    test is skipped.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        for folder in (self.folder, ORIGINAL):
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"{name} is not in tests/golden, and there is no {ORIGINAL}")


def unpack(folder: Path) -> None:
    """Write the files of ``tests/golden`` below `folder`."""
    for path in PACKED.rglob("*.*"):
        target = folder / path.relative_to(PACKED)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            target.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        else:
            shutil.copyfile(path, target)
    for facts in (folder / "checkpoints").glob("*.json"):
        content = {"model": unpack_tensors(facts), **json.loads(facts.read_text())["content"]}
        torch.save(content, facts.with_suffix(".pt"))
    names = json.loads((folder / "hf_export/names.json").read_text())
    for config in (folder / "hf_export").glob("*/config.json"):
        state = unpack_tensors(folder / f"checkpoints/{config.parent.name}.json")
        halves = {id(tensor): tensor.half() for tensor in state.values()}
        exported = {name: halves[id(state[recorded])] for name, recorded in names.items()}
        torch.save(exported, config.with_name("pytorch_model.bin"))
        for name in ("dict.txt", "sp.model"):
            shutil.copyfile(folder / "tiny_vocab" / name, config.with_name(name))


def unpack_tensors(facts: Path) -> dict[str, torch.Tensor]:
    """Read tensors in float32 from an ``.npz`` of bytes and the ``.json`` of names and shapes.

    The lowest bytes of all numbers come first, then the second ones, and so on: that compresses
    better. A tensor with another's name in place of a shape is that one. Of a position table only
    the rows that recorded inputs reach are stored; the others ascend, with the mean and standard
    deviation of the original's.
    """
    planes = np.load(facts.with_suffix(".npz"))["bytes"]
    kind = np.dtype(f"<f{len(planes)}")
    values = np.ascontiguousarray(planes.T).view(kind).ravel()
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, *table in json.loads(facts.read_text())["tensors"]:
        if isinstance(shape, str):
            tensors[name] = tensors[shape]
            continue
        num_stored, mean, deviation = table or (shape[0], 0.0, 0.0)
        count = num_stored * math.prod(shape[1:])
        ramp = np.linspace(-1, 1, math.prod(shape) - count)
        others = mean + deviation * ramp / (ramp.std() if len(ramp) else 1)
        flat = np.concatenate([values[:count], others.astype(kind)]).astype(np.float32)
        tensors[name] = torch.from_numpy(flat.reshape(shape))
        values = values[count:]
    assert not len(values)
    return tensors
