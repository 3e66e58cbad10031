"""Back to fairseq: round trips are exact, tensor by tensor, and training goes on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from metro.conversion.fairseq_to_hf import to_hf
from metro.conversion.hf_to_fairseq import to_fairseq
from tests.conftest import CHECKPOINTS, RECORDED


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def shared_names(state: dict) -> set[frozenset[str]]:
    """The names of tensors that are one in the file."""
    by_storage = {}
    for key, tensor in state.items():
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), set()).add(key)
    return {frozenset(keys) for keys in by_storage.values() if len(keys) > 1}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_to_folder_and_back_is_exact(exported, golden, tmp_path, name):
    """Oracle: the original's checkpoint: every name, value, type, and the settings of its model."""
    original = load(golden / f"checkpoints/{name}.pt")
    done = to_fairseq(exported(name), tmp_path / "back.pt")
    back = load(tmp_path / "back.pt")
    assert_same_tensors(back["model"], original["model"])
    assert shared_names(back["model"]) == shared_names(original["model"])
    assert back["cfg"]["model"] == original["cfg"]["model"]
    assert back["cfg"]["task"] == {
        **original["cfg"]["task"],
        "data": original["cfg"]["task"]["data"].split("/")[-1],
    }
    assert back["optimizer_history"] == original["optimizer_history"]
    assert back["extra_state"].get("val_loss") == original["extra_state"].get("val_loss")
    assert done.names == "original" and done.has_auxiliary is name.startswith("metro")


@pytest.mark.parametrize("name", RECORDED)
def test_released_folder_to_fairseq_and_back_is_exact(golden, tmp_path, name):
    """Oracle: the released folder's own float16 tensors and sizes."""
    folder = golden / f"hf_export/{name}"
    to_fairseq(folder, tmp_path / "model.pt")
    to_hf(tmp_path / "model.pt", tmp_path / "again", vocab=golden / "tiny_vocab")
    released = load(folder / "pytorch_model.bin")
    tensors = load_file(tmp_path / "again/model.safetensors")
    second_names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    kept = {key: tensor for key, tensor in released.items() if key not in second_names}
    assert_same_tensors(tensors, kept)
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "again/config.json").read_text())
    renamed = {"architectures", "model_type", "torch_dtype", "transformers_version"}
    assert {key: after[key] for key in set(before) - renamed} == {
        key: value for key, value in before.items() if key not in renamed
    }


@pytest.mark.parametrize("name", ["metro_tiny_r", "t5_prompt_tiny_f"])
def test_folder_to_checkpoint_and_back_gives_the_same_files(exported, golden, tmp_path, name):
    """Oracle: the first export, byte by byte."""
    to_fairseq(exported(name), tmp_path / "back.pt")
    vocab = golden / "tiny_vocab"
    again = tmp_path / name
    to_hf(tmp_path / "back.pt", again, vocab=vocab, keep_auxiliary=True)
    files = {path.name for path in exported(name).iterdir()}
    assert {path.name for path in again.iterdir()} == files
    for file in files:
        assert (again / file).read_bytes() == (exported(name) / file).read_bytes(), file


@pytest.mark.parametrize("name", ["metro_tiny_a", "t5_tiny_c"])
def test_metros_own_names_are_another_writing_of_the_same(exported, golden, tmp_path, name):
    """Oracle: the export made of the original's names."""
    to_fairseq(exported(name), tmp_path / "metro.pt", names="metro")
    state = load(tmp_path / "metro.pt")["model"]
    assert all(key.startswith("model.") for key in state)
    vocab = golden / "tiny_vocab"
    to_hf(tmp_path / "metro.pt", tmp_path / "again", vocab=vocab, keep_auxiliary=True)
    for file in ("model.safetensors", "pretraining.safetensors", "config.json"):
        if (exported(name) / file).exists():
            assert (tmp_path / "again" / file).read_bytes() == (exported(name) / file).read_bytes()
    # A checkpoint of this project keeps its names on the way.
    to_fairseq(tmp_path / "again", tmp_path / "back.pt")
    assert_same_tensors(load(tmp_path / "back.pt")["model"], state)


def test_without_the_auxiliary_model_it_is_a_plain_t5(golden, tmp_path):
    """Oracle: names in the file."""
    checkpoint = golden / "checkpoints/metro_tiny_a.pt"
    to_hf(checkpoint, tmp_path / "out", vocab=golden / "tiny_vocab")
    done = to_fairseq(tmp_path / "out", tmp_path / "back.pt")
    back = load(tmp_path / "back.pt")
    assert not done.has_auxiliary and done.model == "transformer_t5_base_rpe"
    assert not any(key.startswith(("generator", "rtd_head")) for key in back["model"])
    original = load(checkpoint)["model"]
    main = {k: t for k, t in original.items() if k.startswith(("encoder", "decoder"))}
    assert_same_tensors(back["model"], main)
    assert back["cfg"]["model"]["encoder_layers"] == 2


def test_dtype_and_taken_names(exported, tmp_path):
    out = tmp_path / "model.pt"
    to_fairseq(exported("t5_tiny_c"), out, dtype=torch.float16)
    assert {tensor.dtype for tensor in load(out)["model"].values()} == {torch.float16}
    with pytest.raises(ValueError, match="exists.*--overwrite"):
        to_fairseq(exported("t5_tiny_c"), out)
    to_fairseq(exported("t5_tiny_c"), out, overwrite=True)
    assert load(out)["model"]["encoder.embed_tokens.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="names is 'mine'; use one of original, metro"):
        to_fairseq(exported("t5_tiny_c"), tmp_path / "other.pt", names="mine")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_damaged_training_file_is_refused(exported, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(exported("metro_tiny_a"), folder)
    (folder / "training.json").write_text("{")
    with pytest.raises(ValueError, match="training.json is not the JSON file"):
        to_fairseq(folder, tmp_path / "model.pt")
    shutil.copyfile(exported("metro_tiny_r") / "training.json", folder / "training.json")
    with pytest.raises(ValueError, match="missing: .*rtd_head.dense.weight"):
        to_fairseq(folder, tmp_path / "model.pt")


def test_other_models_are_refused(golden, tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    shutil.copyfile(golden / "flipped/tiny_t5_config.json", folder / "config.json")
    with pytest.raises(ValueError, match="type 't5'; only METRO-T5"):
        to_fairseq(folder, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no config.json"):
        to_fairseq(tmp_path, tmp_path / "model.pt")
