"""Files that are not what they should be: code in them is refused, damage is named.

Oracle throughout: files made from the recorded checkpoints with one thing wrong on purpose.
"""

import argparse
import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import metro
from metro.conversion.fairseq_to_hf import to_hf
from metro.conversion.hf_to_fairseq import to_fairseq
from metro.models.fairseq_checkpoint import read_checkpoint
from metro.models.reading import allowed_classes, load_tensors_and_settings
from metro.training.sharding import load_shards, save_shards
from metro.utils.messages import UserError


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch '{self.marker}'",))


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "the payload ran"
    yield path
    assert not path.exists()


@pytest.fixture
def checkpoint(golden):
    """The content of a recorded checkpoint, to spoil."""
    return torch.load(golden / "checkpoints/metro_tiny_a.pt", weights_only=True)


@pytest.fixture
def refused(golden, tmp_path):
    """``refused(content, match)``: neither converted nor loaded, one line, nothing written."""

    def check(content, match: str) -> str:
        path = tmp_path / "bad.pt"
        if content is not None:
            torch.save(content, path)
        vocab = golden / "tiny_vocab"
        for use in (
            lambda: to_hf(path, tmp_path / "out", vocab=vocab),
            lambda: metro.load(path, vocab=vocab),
        ):
            with pytest.raises(UserError, match=match) as error:
                use()
            assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
        return str(error.value)

    return check


@pytest.mark.parametrize("where", ["cfg", "model", "extra_state", "top"])
def test_a_payload_is_refused_and_does_not_run(checkpoint, refused, marker, where):
    payload = Payload(marker)
    if where == "top":
        checkpoint["anything"] = payload
    else:
        checkpoint[where] = {**(checkpoint[where] or {}), "anything": payload}
    message = refused(checkpoint, "nothing in it was run")
    assert "system" in message


def test_the_payload_works_where_nobody_looks(checkpoint, tmp_path):
    """The test above can fail: plain unpickling runs it."""
    checkpoint["anything"] = Payload(tmp_path / "ran")
    torch.save(checkpoint, tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(refused, marker, tmp_path):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    refused(None, "bad.pt")


def test_a_payload_in_the_weights_of_a_folder_is_refused(golden, tmp_path, marker):
    folder = tmp_path / "folder"
    shutil.copytree(golden / "hf_export/metro_tiny_a", folder)
    weights = folder / "pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    weights.chmod(0o644)
    torch.save({**state, "anything": Payload(marker)}, weights)
    with pytest.raises(ValueError, match="nothing in them was run"):
        metro.load(folder)
    with pytest.raises(ValueError, match="nothing in it was run"):
        to_fairseq(folder, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_a_payload_in_a_sharded_checkpoint_is_refused(tmp_path, marker):
    """In what describes it, and in the optimizer's values; without one it is read."""
    weights = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=0.5)
    weights(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    again = copy.deepcopy(weights).requires_grad_()
    save_shards(tmp_path / "shards", weights, optimizer)
    torch.nn.init.zeros_(again.weight)
    other = torch.optim.AdamW(again.parameters())
    load_shards(tmp_path / "shards", again, other)
    assert torch.equal(again.weight, weights.weight) and other.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["lr"] = Payload(marker)
    save_shards(tmp_path / "values", weights, optimizer)
    (tmp_path / "shards/.metadata").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("shards", "values"):
        with pytest.raises(UserError, match="nothing in it was run.*system") as error:
            load_shards(tmp_path / name, again, other)
        assert "\n" not in str(error.value)


def test_classes_that_keep_no_settings_are_refused_by_name(checkpoint, refused, tmp_path):
    checkpoint["cfg"]["task"]["data"] = Path(tmp_path)
    refused(checkpoint, "(?i)posixpath|pathlib")


@pytest.mark.parametrize("kept", [0, 10, 2000, 0.5, 0.999])
def test_a_file_that_was_cut_is_named(golden, tmp_path, refused, kept):
    data = (golden / "checkpoints/metro_tiny_a.pt").read_bytes()
    size = int(len(data) * kept) if isinstance(kept, float) else kept
    (tmp_path / "bad.pt").write_bytes(data[:size])
    refused(None, "bad.pt cannot be read as a checkpoint.*")


@pytest.mark.parametrize("is_zip", [True, False])
def test_damaged_bytes_never_end_in_another_error(tmp_path, is_zip):
    """Oracle: a file with any byte changed is read, or refused as one of the user's."""
    content = {"cfg": {"model": argparse.Namespace(a=1)}, "model": {"b": torch.zeros(3)}}
    path = tmp_path / "bad.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    data, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged[: random.choice([len(data), random.integers(len(data))])])
        try:
            load_tensors_and_settings(path)
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["dict.txt", "sp.model"])
def test_another_kind_of_file_is_named(golden, tmp_path, refused, name):
    shutil.copyfile(golden / f"tiny_vocab/{name}", tmp_path / "bad.pt")
    refused(None, "bad.pt cannot be read as a checkpoint.*another kind of file")


def test_bare_weights_are_no_checkpoint(golden, tmp_path, refused):
    source = golden / "hf_export/metro_tiny_a/pytorch_model.bin"
    shutil.copyfile(source, tmp_path / "bad.pt")
    refused(None, "give the Hugging Face folder")
    refused([1, 2], "not a fairseq checkpoint")
    refused({"model": {}, "cfg": None}, "no settings")


def test_missing_unexpected_and_misshapen_tensors_are_listed_at_once(checkpoint, refused):
    model = checkpoint["model"]
    del model["encoder.layers.1.fc1.bias"], model["decoder.layernorm_embedding.weight"]
    model["decoder.layers.0.fc2.weight"] = torch.zeros(64, 5)
    model["encoder.layers.0.self_attn_rel_pos.rel_attn_bias.weight"] = torch.zeros(31, 4)
    model["rtd_head.extra"] = torch.zeros(1)
    message = refused(checkpoint, "are not those of")
    missing, unexpected, shapes = message.split("; ")[1:4]
    assert missing.startswith("missing: ")
    assert set(missing.removeprefix("missing: ").split(", ")) == {
        "encoder.block.1.layer.1.DenseReluDense.wi.bias",
        "decoder.first_layer_norm.weight",
    }
    assert unexpected == "unexpected: rtd_head.extra"
    assert "decoder.block.0.layer.2.DenseReluDense.wo.weight (64, 5) instead of (64, 128)" in shapes
    assert "relative_attention_bias.weight (31, 4) instead of (32, 4)" in shapes


def test_a_tensor_of_another_model_is_named(checkpoint, refused):
    checkpoint["model"]["encoder.layers.0.gate.weight"] = torch.zeros(1)
    refused(checkpoint, "encoder.layers.0.gate.weight")


@pytest.mark.parametrize(
    "option, value, tensor",
    [
        ("encoder_embed_dim", 128, "(1128, 64) instead of (1128, 128)"),
        ("encoder_ffn_embed_dim", 256, "(128, 64) instead of (256, 64)"),
        ("decoder_layers", 3, "missing: decoder.block.2.layer.0.SelfAttention"),
        ("encoder_rp_bins", 64, "(32, 4) instead of (64, 4)"),
        ("max_positions", 512, "(1026, 64) instead of (514, 64)"),
        ("encoder_attention_heads", 8, "(32, 4) instead of (32, 8)"),
    ],
)
def test_settings_that_disagree_with_the_weights_are_refused(
    checkpoint, refused, option, value, tensor
):
    checkpoint["cfg"]["model"][option] = value
    assert tensor in refused(checkpoint, "are not those of")


def test_settings_that_cannot_be_are_refused(checkpoint, refused):
    checkpoint["cfg"]["model"]["activation_fn"] = "swish"
    refused(checkpoint, "swish.*relu")
    del checkpoint["cfg"]["model"]["encoder_ffn_embed_dim"]
    refused(checkpoint, "encoder_ffn_embed_dim")
    for value in (0, -64, 64.0, "64", True):
        checkpoint["cfg"]["model"]["encoder_attention_heads"] = value
        refused(checkpoint, f"encoder_attention_heads is {value!r}, which must be a whole number")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dropout", "x", "dropout is 'x', which must be a number from 0 to 1"),
        ("dropout", [1], r"dropout is \[1\], which"),
        ("dropout", True, "dropout is True, which"),
        ("attention_dropout", "a", "attention_dropout is 'a', which"),
        ("activation_dropout", float("nan"), "activation_dropout is nan, which"),
        ("activation_fn", "swish", "bad.pt has settings .*'swish'; use 'relu' or 'gelu'"),
        ("encoder_attention_heads", 1000, "bad.pt has settings .*d_kv is 0"),
    ],
)
def test_settings_of_another_type_or_range_are_named(checkpoint, refused, option, value, message):
    checkpoint["cfg"]["model"][option] = value
    refused(checkpoint, message)


def test_values_that_are_no_settings_are_refused_or_left_out(golden, checkpoint, refused, tmp_path):
    """Oracle: by hand; nothing of it may end in a traceback."""
    inner = argparse.Namespace()
    inner.inner = inner
    refused({**checkpoint, "cfg": {**checkpoint["cfg"], "task": inner}}, "contain themselves")
    for wrong in ("a", 5, ["a"], {"model": "a"}, {"model": ["a"]}):
        refused({**checkpoint, "cfg": wrong}, "holds no settings")
    checkpoint["cfg"] |= {"criterion": "a", "optimization": ["a"], "lr_scheduler": 5}
    checkpoint |= {"optimizer_history": ["a", 5], "extra_state": ["a"]}
    torch.save(checkpoint, tmp_path / "odd.pt")
    to_hf(tmp_path / "odd.pt", tmp_path / "odd", vocab=golden / "tiny_vocab")
    assert json.loads((tmp_path / "odd/training.json").read_text())["history"] == []


def test_what_is_no_tensor_of_floating_point_numbers_is_named(checkpoint, refused):
    name = "encoder.layers.0.fc1.weight"
    whole = torch.zeros(128, 64)
    for wrong in (5, [1.0], whole.int(), whole.to_sparse()):
        checkpoint["model"][name] = wrong
        refused(checkpoint, f"dense floating point tensors.*'{name}'")


def test_two_embeddings_where_the_model_has_one_are_refused(checkpoint, refused):
    model = checkpoint["model"]
    model["decoder.output_projection.weight"] = model["encoder.embed_tokens.weight"] + 1
    refused(checkpoint, "lm_head.weight and shared.weight.*inconsistent")


def test_a_vocabulary_of_another_model_is_refused(golden, vocab, tmp_path):
    path = golden / "checkpoints/metro_tiny_a.pt"
    with pytest.raises(ValueError, match="150 entries.*128 sentinels.*1128 rows"):
        to_hf(path, tmp_path / "out", vocab=vocab)
    with pytest.raises(ValueError, match="neither in .* nor in .*--vocab"):
        to_hf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an export, to spoil, as if it came without checksums."""
    shutil.copytree(exported("t5_tiny_c"), tmp_path / "folder")
    (tmp_path / "folder/checksums.json").unlink()
    return tmp_path / "folder"


def both_refuse(folder: Path, match: str) -> str:
    """Neither loaded nor converted back; the last message."""
    for use in (lambda: to_fairseq(folder, folder.parent / "out.pt"), lambda: metro.load(folder)):
        with pytest.raises(UserError, match=match) as error:
            use()
        assert "\n" not in str(error.value)
    assert not (folder.parent / "out.pt").exists()
    return str(error.value)


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_tensors_of_a_folder_are_checked_and_listed_at_once(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.pos_embed.weight"]
    tensors["more.weight"] = torch.zeros(2)
    tensors["encoder.pos_embed.weight"] = torch.zeros(7, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = both_refuse(folder, "are not those of")
    assert "missing: decoder.pos_embed.weight" in message
    assert "unexpected: more.weight" in message
    assert "encoder.pos_embed.weight (7, 64) instead of (1026, 64)" in message


def test_a_second_embedding_that_differs_is_refused(folder):
    """Oracle: by hand; a value, and a shape."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["shared.weight"]
    for other in (embedding + 1, embedding[:3].clone()):
        tensors["lm_head.weight"] = other
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="shared.weight and lm_head.weight.*inconsistent"):
            to_fairseq(folder, folder.parent / "out.pt")


def test_a_config_of_another_model_is_refused(folder):
    change_json(folder / "config.json", d_ff=256)
    both_refuse(folder, r"wi.weight \(128, 64\) instead of \(256, 64\)")
    change_json(folder / "config.json", relative_attention_num_buckets=31)
    both_refuse(folder, "relative_attention_num_buckets is 31")
    change_json(folder / "config.json", relative_attention_num_buckets=32, d_model=-64)
    both_refuse(folder, "d_model is -64; use a whole number of at least 1")


def test_nobody_is_asked_at_the_terminal_to_run_code(folder, monkeypatch):
    """Oracle: `input`, which transformers calls to ask, and a trap in the code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "configuration_metro_t5.py").write_text("raise SystemExit('it ran')")
    change_json(folder / "config.json", model_type="somebodys_own")
    both_refuse(folder, "custom code")


def test_a_tokenizer_of_another_model_is_refused(folder, vocab):
    change_json(folder / "tokenizer_config.json", n_sentinel_tokens=512)
    both_refuse(folder, "1512 entries.*vocab_size 1128|1000 entries and 512 sentinels.*1128 rows")
    change_json(folder / "tokenizer_config.json", n_sentinel_tokens=128)
    shutil.copyfile(vocab / "dict.txt", folder / "dict.txt")
    both_refuse(folder, "dict.txt and sp.model differ")


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("tokenizer_config.json", {"n_sentinel_tokens": None}),
        ("tokenizer_config.json", {"n_sentinel_tokens": "x"}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", []),
        ("special_tokens_map.json", []),
        ("config.json", {"torch_dtype": "foo", "dtype": "foo"}),
        ("config.json", {"pad_token_id": None}),
        ("config.json", {"pad_token_id": "x"}),
    ],
)
def test_fields_of_another_type_in_a_folder_are_one_line(folder, file, fields):
    if fields:
        change_json(folder / file, **fields)
    else:
        (folder / file).write_text(json.dumps(fields))
    with pytest.raises(UserError, match="folder") as error:
        metro.load(folder)
    assert "\n" not in str(error.value)


def test_damaged_files_of_a_folder_are_named(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    both_refuse(folder, "folder.*(Error while|incomplete|deserializ)")
    (folder / "model.safetensors").unlink()
    both_refuse(folder, "folder.*model.safetensors")
    (folder / "config.json").write_text("{")
    both_refuse(folder, "config.json is not the JSON")


def test_only_the_named_containers_are_allowed(golden):
    """Oracle: the list; whatever it grows by should be argued for here."""
    names = {getattr(entry, "__qualname__", str(entry)) for entry in allowed_classes()}
    plain = {"Namespace", "OrderedDict", "defaultdict", "dict", "list", "tuple", "set", "int"}
    assert plain <= names
    omega = {"DictConfig", "ListConfig", "ContainerMetadata", "Metadata"}
    omega |= {f"{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean")}
    assert names - plain - {"Any", "typing.Any"} in (set(), omega)
    assert read_checkpoint(golden / "checkpoints/metro_tiny_a.pt").names == "original"
