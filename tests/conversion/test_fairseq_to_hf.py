"""Exports of fairseq checkpoints against what the original's fairseq model computes."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import metro
from metro.conversion.fairseq_to_hf import to_hf
from metro.generation.answers import GenerationSettings, answer_texts
from metro.models.fairseq_names import metro_name
from tests.conftest import CHECKPOINTS, RECORDED


@pytest.fixture(autouse=True)
def registered():
    metro.register()


@pytest.fixture
def converted(golden, tmp_path):
    """``converted(name, change)``: the folder made of a recorded checkpoint after a change."""

    def convert(name: str, change, **options):
        content = torch.load(golden / f"checkpoints/{name}.pt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "changed.pt")
        folder = tmp_path / "out"
        vocab = golden / "tiny_vocab"
        return folder, to_hf(tmp_path / "changed.pt", folder, vocab=vocab, **options)

    return convert


def batch(golden, name):
    arrays = np.load(golden / f"hf_{name}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def test_logits_equal_the_original_in_fairseq(golden, tmp_path):
    """Oracle: recorded logits and encoder states of the original's fairseq model, float32."""
    check_logits(golden, golden, "metro_tiny_a", tmp_path)


def test_logits_of_the_whole_recording_equal_the_original_in_fairseq(golden, original, tmp_path):
    """As above, with the float32 weights that ``tests/golden`` lacks."""
    for name in RECORDED:
        check_logits(golden, original, name, tmp_path / name)


@torch.no_grad()
def check_logits(golden, source, name: str, folder: Path) -> None:
    recorded = np.load(source / f"fairseq_logits_{name}.npz")
    checkpoint = source / f"checkpoints/{name}.pt"
    to_hf(checkpoint, folder / "out", vocab=golden / "tiny_vocab")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "out").eval()
    inputs = batch(golden, name)
    mask = inputs["attention_mask"]
    output = model(inputs["input_ids"], mask, inputs["decoder_input_ids"])
    rows = len(recorded["logits_fp32"])
    states = torch.from_numpy(recorded["encoder_out_fp32"])
    difference = output.encoder_last_hidden_state[:rows] - states
    assert difference[mask[:rows].bool()].abs().max() < 1e-5
    difference = output.logits[:rows] - torch.from_numpy(recorded["logits_fp32"])
    assert difference[inputs["labels"][:rows] > 1].abs().max() < 3e-5


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_of_the_checkpoint_is_there_exactly(exported, golden, name):
    """Oracle: the checkpoint itself; only markers and second names may be absent."""
    state = torch.load(golden / f"checkpoints/{name}.pt", weights_only=True)["model"]
    folder = exported(name)
    tensors = {f"main.{key}": t for key, t in load_file(folder / "model.safetensors").items()}
    if (folder / "pretraining.safetensors").exists():
        tensors |= load_file(folder / "pretraining.safetensors")
    absent = []
    for key, tensor in state.items():
        found = tensors.get(metro_name(key) or "")
        if found is None:
            absent.append(key)
        else:
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype, key
    embedding = state["encoder.embed_tokens.weight"]
    assert torch.equal(tensors["main.shared.weight"], embedding)
    main_encoder = {
        "generator.sentence_encoder." + key.removeprefix("encoder."): key
        for key in state
        if key.startswith("encoder.")
    }
    for key in absent:
        is_second_name = (
            key in ("generator.lm_head.weight", "decoder.output_projection.weight")
            or key.endswith("embed_tokens.weight")
            or (key in main_encoder and torch.equal(state[key], state[main_encoder[key]]))
        )
        assert key.endswith("version") or is_second_name, key


def test_config_states_every_size_and_what_the_original_loses(exported):
    """Oracle: the sizes of the recorded checkpoints, as their description lists them."""
    config = json.loads((exported("metro_tiny_r") / "config.json").read_text())
    expected = dict(
        vocab_size=1128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2,
        num_heads=4, relative_attention_num_buckets=32, relative_attention_max_distance=128,
        max_positions=1024, layer_norm_epsilon=1e-5, feed_forward_proj="relu", dropout_rate=0.0,
        pad_token_id=1, eos_token_id=2, bos_token_id=0, model_type="metro_t5", dtype="float32",
        is_encoder_decoder=True, tie_word_embeddings=True,
        architectures=["MetroT5ForConditionalGeneration"],
    )  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert config["auto_map"]["AutoModelForSeq2SeqLM"].split(".") == [
        "modeling_metro_t5",
        "MetroT5ForConditionalGeneration",
    ]


def test_distances_of_large_models_survive(converted):
    """Oracle: 128 buckets up to 256 tokens, what the large configuration trains with."""

    def enlarge(content):
        content["cfg"]["model"] |= {"encoder_rp_bins": 128, "encoder_rp_max_dist": 256}
        for name, tensor in content["model"].items():
            if "rel_attn_bias" in name:
                content["model"][name] = torch.zeros(128, tensor.shape[1])

    config = metro.load(converted("t5_tiny_c", enlarge)[0]).model.config
    assert config.relative_attention_max_distance == 256
    assert config.relative_attention_num_buckets == 128


@pytest.mark.parametrize(
    "name, start, end",
    [("metro_tiny_a", 1000, [1000, 2]), ("t5_tiny_c", 1000, 1000), ("t5_prompt_tiny_f", 2, 2)],
)
def test_generation_starts_and_ends_as_the_model_was_trained(exported, golden, name, start, end):
    """Oracle: ``greedy_start_and_stop_sen000`` for pretrained models, ``greedy`` for finetuned."""
    model = AutoModelForSeq2SeqLM.from_pretrained(exported(name)).eval()
    model = model.half().float()  # the recorded sequences come from weights rounded to float16
    config, inputs = model.generation_config, batch(golden, name)
    assert (config.decoder_start_token_id, config.eos_token_id) == (start, end)
    assert model.config.decoder_start_token_id == start
    sequences = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=40, do_sample=False
    )
    recorded = inputs["greedy" if start == 2 else "greedy_start_and_stop_sen000"]
    assert torch.equal(sequences, recorded)


def test_tokenizer_of_the_export_gives_the_recorded_ids(exported, golden):
    """Oracle: ids of the original's tokenizer for the recorded sentences."""
    recorded = json.loads((golden / "hf_generation.json").read_text())
    sentences = recorded["models"]["metro_tiny_a"]["sentences"]
    tokenizer = AutoTokenizer.from_pretrained(exported("metro_tiny_a"))
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], batch(golden, "metro_tiny_a")["input_ids"])
    assert len(tokenizer) == 1128 and tokenizer.model_max_length == 1024


@pytest.mark.parametrize("keep", [True, False])
def test_auxiliary_parts_are_kept_on_request_alone(tmp_path, golden, keep):
    """Oracle: names in the files, and the message."""
    done = to_hf(
        golden / "checkpoints/metro_tiny_r.pt",
        tmp_path / "out",
        vocab=golden / "tiny_vocab",
        keep_auxiliary=keep,
    )
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert not any(name.startswith(("auxiliary", "rtd_head")) for name in names)
    kept = tmp_path / "out/pretraining.safetensors"
    assert kept.exists() is keep
    assert any("auxiliary model and the RTD head" in part for part in done.dropped) is not keep
    place = "in `pretraining.safetensors`" if keep else "left out"
    assert f"| auxiliary model and RTD head | {place} |" in (tmp_path / "out/README.md").read_text()
    if keep:
        assert {"rtd_head.dense.weight", "auxiliary.lm_head.bias"} <= set(load_file(kept))


def test_dtype_changes_every_tensor_and_is_the_one_that_loads(tmp_path, golden):
    """Oracle: torch's own rounding of the checkpoint's tensors."""
    checkpoint = golden / "checkpoints/t5_prompt_tiny_f.pt"
    vocab = golden / "tiny_vocab"
    to_hf(checkpoint, tmp_path / "out", vocab=vocab, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    state = torch.load(checkpoint, weights_only=True)["model"]
    rounded = state["encoder.layers.1.fc1.weight"].to(torch.bfloat16)
    assert torch.equal(tensors["encoder.block.1.layer.1.DenseReluDense.wi.weight"], rounded)
    assert metro.load(tmp_path / "out").model.dtype == torch.bfloat16
    assert metro.load(tmp_path / "out", dtype="float32").model.dtype == torch.float32


def test_weights_keep_their_type_without_one(converted):
    """Oracle: a checkpoint in float16, as training with --fp16 writes it."""

    def halve(content):
        content["model"] = {name: tensor.half() for name, tensor in content["model"].items()}

    folder, done = converted("t5_tiny_c", halve)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert done.dtype == json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def namespace(content: dict) -> None:
    """As the original's code leaves ``cfg``: model options in a Namespace."""
    content["cfg"] |= {"model": argparse.Namespace(**content["cfg"]["model"])}


def omega(content: dict) -> None:
    """As fairseq holds it in memory."""
    from omegaconf import OmegaConf

    content["cfg"] = OmegaConf.create(content["cfg"])


def before_configurations(content: dict) -> None:
    """As fairseq wrote it before it had configurations: one namespace, the model by `arch`."""
    cfg = content.pop("cfg")
    names = {"_name": None, "arch": cfg["model"]["_name"], "task": cfg["task"]["_name"]}
    content["args"] = argparse.Namespace(**{**cfg["task"], **cfg["model"], **names})


@pytest.mark.parametrize(
    "change", [namespace, pytest.param(omega, marks=pytest.mark.fairseq), before_configurations]
)
def test_settings_in_any_container_of_fairseq_are_read(converted, exported, change):
    """Oracle: the export of the same checkpoint with plain settings."""
    folder, _ = converted("metro_tiny_a", change, keep_auxiliary=True)
    files = ["config.json", "model.safetensors", "pretraining.safetensors"]
    files += ["training.json"] * (change is not before_configurations)
    for name in files:
        assert (folder / name).read_bytes() == (exported("metro_tiny_a") / name).read_bytes(), name


def test_model_card_says_what_the_settings_say(exported, golden):
    """Oracle: the settings and losses in the checkpoint."""
    card = (exported("metro_tiny_a") / "README.md").read_text()
    content = torch.load(golden / "checkpoints/metro_tiny_a.pt", weights_only=True)
    model_parameters = 371_456  # one embedding, counted from the shapes in the recorded folder
    for text in (
        "license:  # fill in",
        f"| parameters | {model_parameters:,} |",
        "| layers, encoder + decoder | 2 + 2 |",
        "| updates | 300 |",
        "| data | wiki2tiny-bin |",
        f"| validation loss, last | {content['extra_state']['val_loss']:.3f} bits |",
        f"| learning rate | {content['cfg']['optimization']['lr'][0]:g} |",
        "trust_remote_code=True",
    ):
        assert text in card, text
    assert "| updates | 300 + 350 |" in (exported("t5_prompt_tiny_f") / "README.md").read_text()


@pytest.mark.parametrize("name", ["metro_tiny_a", "t5_tiny_c", "t5_prompt_tiny_f"])
def test_the_example_of_the_card_prints_the_answer_alone(exported, name, capsys, monkeypatch):
    """Oracle: the answer of ``metro generate``, but for sentinels, which are special tokens."""
    folder = exported(name)
    monkeypatch.chdir(folder.parent)
    example = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(example.replace(", trust_remote_code=True", ""), {})
    text = example.split('tokenizer("')[1].split('"')[0]
    (answered,) = answer_texts(*metro.load(folder), [text], GenerationSettings(max_new_tokens=64))
    printed = capsys.readouterr().out.strip()
    assert printed == re.sub(r"<sen\d+>", "", answered.answers[0]).strip()
    assert printed or name == "metro_tiny_a"  # which ends at once


def test_files_name_no_path_of_the_machine_that_trained(tmp_path, converted):
    """Oracle: a path put into the settings."""
    data = {"data": f"{tmp_path}/secret/books:{tmp_path}/secret/web"}
    folder, _ = converted("t5_tiny_c", lambda content: content["cfg"]["task"].update(data))
    for name in ("README.md", "training.json", "config.json", "tokenizer_config.json"):
        assert "secret" not in (folder / name).read_text(), name
    assert "| data | books:web |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("where", ["data", "beside", "relative", "vocab"])
def test_vocabulary_is_found_through_the_checkpoint(tmp_path, golden, where, monkeypatch):
    """Oracle: the folder that the settings name, wherever the command is started."""
    source = golden / "tiny_vocab"
    content = torch.load(golden / "checkpoints/t5_tiny_c.pt", weights_only=True)
    place = {"data": tmp_path / "text", "beside": tmp_path / "run"}.get(where, tmp_path / "text")
    for folder in (place, tmp_path / "run"):
        folder.mkdir(exist_ok=True)
    for name in ("sp.model", "dict.txt"):
        (place / name).write_bytes((source / name).read_bytes())
    data = {"data": str(place), "beside": "gone", "relative": "text", "vocab": "gone"}[where]
    content["cfg"]["task"] |= {"data": data, "vocab": str(place) if where == "vocab" else None}
    torch.save(content, tmp_path / "run/c.pt")
    monkeypatch.chdir("/")
    assert to_hf(tmp_path / "run/c.pt", tmp_path / "out").vocabulary.resolve() == place


def test_a_vocabulary_made_uncased_stays_so(tmp_path, text):
    """Oracle: the note that `metro prepare-text` leaves; without it the pieces decide."""
    from metro.data.text.corpus import prepare_text
    from metro.models.vocabulary_folder import build_tokenizer

    (tmp_path / "text.txt").write_text(text.read_text(encoding="utf-8").title(), encoding="utf-8")
    folder = tmp_path / "cased"
    inputs = [tmp_path / "text.txt"]
    prepare_text(
        inputs=inputs, out=folder, train_vocab=150, cased=True, num_workers=1, progress=False
    )
    (folder / "prepare_text.json").unlink()
    size = 150 + 512
    assert build_tokenizer(folder, size).lower is False  # its pieces hold capitals
    assert build_tokenizer(folder, size, lower=True).lower is True
    for note in ("prepare_text.json", "prompts.json"):
        (folder / note).write_text('{"settings": {"lower": true}}')
        assert build_tokenizer(folder, size).lower is True
        (folder / note).unlink()
