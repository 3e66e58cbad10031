"""The committed part of the recording agrees with the whole, wherever that is at hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.golden_files import PACKED, Golden, unpack_tensors

NAMES = sorted(
    path.relative_to(PACKED).as_posix().removesuffix(".gz")
    for path in PACKED.rglob("*.*")
    if path.is_file() and path.suffix != ".md"
)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)
    return state.get("model", state)


def assert_equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Rounded weights equal the others' rounded; rows that are not stored have their moments."""
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        if "embed_positions" in name or "pos_embed" in name:
            for moment in (torch.mean, torch.std):
                found, wanted = (moment(table[132:].double()) for table in (tensor, other))
                assert float(found) == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
            tensor, other = tensor[:132], other[:132]
        rounded = torch.equal(tensor, tensor.half().float())
        assert torch.equal(tensor, other.half().to(tensor.dtype) if rounded else other), name


def test_every_file_agrees_with_the_whole_recording(golden, original):
    for name in NAMES:
        assert_agrees(golden, original, name)


def assert_agrees(golden: Golden, original: Path, name: str) -> None:
    ours, theirs = golden.folder / name, original / name
    if name.startswith("checkpoints/"):
        ours, theirs = ours.with_suffix(".pt"), theirs.with_suffix(".pt")
        assert_equal_weights(tensors_of(ours), tensors_of(theirs))
        content, whole = (torch.load(path, weights_only=True) for path in (ours, theirs))
        del whole["extra_state"]["metrics"], content["model"], whole["model"]
        assert content == whole
    elif name == "hf_export/names.json":
        for exported in original.glob("hf_export/*/pytorch_model.bin"):
            mine = golden.folder / exported.relative_to(original)
            if mine.exists():
                assert_equal_weights(tensors_of(mine), tensors_of(exported))
    elif name.startswith("flipped/tiny_t5."):
        tensors = unpack_tensors(ours.with_suffix(".json"))
        whole = load_file(theirs.with_suffix(".safetensors"))
        assert tensors.keys() == whole.keys()
        assert all(torch.equal(tensors[key], whole[key]) for key in tensors)
    elif name.endswith(".npz"):
        arrays, whole = np.load(ours), np.load(theirs)
        for key in arrays.files:
            np.testing.assert_array_equal(arrays[key], whole[key][: len(arrays[key])], key)
    else:
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_the_folder_stays_small():
    """Every clone carries it."""
    assert sum(path.stat().st_size for path in PACKED.rglob("*.*") if path.is_file()) < 6_000_000


def test_facts_of_packed_tensors_leave_no_bytes_over(golden):
    """Oracle: the number of parameters by the shapes of `metro_tiny_r`, shared ones once."""
    state = tensors_of(golden / "checkpoints/metro_tiny_r.pt")
    storages = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in state.values()}
    assert sum(storages.values()) == 414_828
    facts = json.loads((golden / "checkpoints/metro_tiny_r.json").read_text())
    assert {name for name, *_ in facts["tensors"]} == state.keys()
