"""``metro.load`` and the Auto classes: released folders natively, anything else by what it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import metro
from metro.conversion.hf_to_fairseq import to_fairseq
from metro.modeling.modeling_metro_t5 import MetroT5EncoderModel, MetroT5ForConditionalGeneration
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from metro.models.fairseq_checkpoint import TIED
from metro.models.loading import LoadedModel, fast_dtype, resolve_dtype
from metro.utils.messages import UserError
from tests.conftest import RECORDED
from tests.processes import run_python

REMOTE_FILES = ("configuration_fairseq_t5", "modeling_fairseq_t5", "tokenization_fairseq_t5")


@pytest.fixture
def hub_folder(golden, tmp_path):
    """A folder as on the Hub: with the authors' Python files, here files that tell if they run."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(golden / f"hf_export/{name}", folder)
        for path in folder.iterdir():
            path.chmod(0o644)
        for stem in REMOTE_FILES:
            trap = f"open({str(tmp_path / 'ran')!r}, 'w')\nraise RuntimeError('remote code ran')\n"
            (folder / f"{stem}.py").write_text(trap)
        change_json(
            folder / "config.json",
            auto_map={
                "AutoConfig": "configuration_fairseq_t5.FairseqT5Config",
                "AutoModelForSeq2SeqLM": "modeling_fairseq_t5.FairseqT5ForConditionalGeneration",
            },
        )
        change_json(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["tokenization_fairseq_t5.FairseqT5Tokenizer", None]},
        )
        return folder

    yield make
    assert not (tmp_path / "ran").exists()


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_released_folder_loads_natively_and_equals_the_original(hub_folder, golden, name):
    """Oracle: states, logits, greedy and beam search of the original's Hugging Face model."""
    model, tokenizer = metro.load(hub_folder(name))
    assert type(model) is MetroT5ForConditionalGeneration and not model.training
    assert type(tokenizer) is MetroT5Tokenizer
    assert model.dtype == torch.float32  # as torch_dtype says, though the file holds float16
    arrays = np.load(golden / f"hf_{name}.npz")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    recorded = json.loads((golden / "hf_generation.json").read_text())["models"][name]
    inputs = tokenizer(recorded["sentences"], padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], tensors["input_ids"])
    mask = inputs["attention_mask"]
    output = model(**inputs, decoder_input_ids=tensors["decoder_input_ids"])
    rows = len(tensors["logits"])
    states = output.encoder_last_hidden_state[:rows] - tensors["encoder_last_hidden_state"]
    assert states[mask[:rows].bool()].abs().max() < 1e-5
    logits = output.logits[:rows] - tensors["logits"]
    assert logits[tensors["labels"][:rows] > 1].abs().max() < 3e-5
    greedy = model.generate(**inputs, max_length=40, do_sample=False)
    assert torch.equal(greedy, tensors["greedy"])
    beams = dict(num_beams=4, max_length=30)
    beam4 = model.generate(
        **inputs, **beams, length_penalty=1.0, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(beam4.sequences, tensors["beam4"])
    # Sums divided by lengths; transformers 4.17 counted the start token where no end was reached.
    is_cut = (tensors["beam4"] != 2)[:, 1:].all(1)
    scores = beam4.sequences_scores * torch.where(is_cut, 29 / 30, 1.0)
    assert (scores - tensors["beam4_sequences_scores"]).abs().max() < 1e-4
    penalised = model.generate(
        **inputs, **beams, length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3
    )
    assert torch.equal(penalised, tensors["beam4_lenpen2_early"])


def test_a_model_that_only_its_own_code_can_load_is_refused(hub_folder):
    """Oracle: a model type that nobody has registered, and the traps of ``hub_folder``."""
    folder = hub_folder("metro_tiny_a")
    change_json(folder / "config.json", model_type="somebodys_own")
    with pytest.raises(ValueError, match="custom code"):
        metro.load(folder)


def test_code_beside_the_auto_map_is_not_run_either(hub_folder):
    """Oracle: the trap; transformers 4 ran such a file of a folder by itself."""
    folder = hub_folder("t5_prompt_tiny_f")
    (folder / "custom_generate").mkdir()
    trap = folder / "configuration_fairseq_t5.py"
    (folder / "custom_generate/generate.py").write_text(trap.read_text())
    model, tokenizer = metro.load(folder)
    assert model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=2).shape == (1, 3)


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
def test_attention_code_from_the_hub_is_never_asked_for(hub_folder, field, monkeypatch):
    """Oracle: the name in config.json; nobody may get as far as fetching."""
    folder = hub_folder("metro_tiny_a")
    change_json(folder / "config.json", **{field: "somebody/their-kernel"})

    def fetch(*args, **kwargs):
        raise AssertionError("kernel was asked for")

    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", fetch, raising=False)
    try:
        model, _ = metro.load(folder)
    except ValueError as error:
        assert "somebody/their-kernel on the hub, which is code and is not run" in str(error)
    else:  # versions that do not read the field
        assert model.config._attn_implementation == "sdpa"


def test_a_released_folder_saved_again_is_an_ordinary_metro_t5(hub_folder, tmp_path):
    """Oracle: model type and classes in the files, equal weights after another load."""
    model, tokenizer = metro.load(hub_folder("metro_tiny_a"))
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["model_type"] == "metro_t5" and "auto_map" not in config
    settings = json.loads((tmp_path / "again/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "MetroT5Tokenizer"
    again = metro.load(tmp_path / "again").model
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


AUTO_CLASSES = """
import sys
{}
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
import metro
for auto in (AutoConfig, AutoTokenizer, AutoModelForSeq2SeqLM, AutoModel):
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
"""


LOOK = "import metro, importlib.util; importlib.util.find_spec('transformers')"


@pytest.mark.parametrize(
    "first", ["import metro", "", "import metro; import transformers.trainer", LOOK]
)
def test_importing_metro_makes_the_auto_classes_load_a_released_folder(hub_folder, first):
    """Oracle: a fresh process, and the traps in place of the authors' files."""
    done = run_python("-c", AUTO_CLASSES.format(first), hub_folder("metro_tiny_a"))
    names = "Config Tokenizer ForConditionalGeneration EncoderModel".split()
    assert done.stdout.splitlines() == [f"MetroT5{name}" for name in names]


@pytest.mark.parametrize("kept", [*([name] for name in TIED), TIED, []])
def test_the_embedding_is_found_under_any_of_its_names_or_missed(exported, tmp_path, kept):
    """Oracle: the matrix as it was exported; without it the folder is refused, naming it."""
    folder = shutil.copytree(exported("metro_tiny_a"), tmp_path / "folder")
    (folder / "checksums.json").unlink()
    weights = load_file(folder / "model.safetensors")
    embedding = weights.pop("shared.weight")
    weights |= {name: embedding.clone() for name in kept}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if not kept:
        with pytest.raises(ValueError, match="missing: .*shared.weight"):
            metro.load(folder)
        return
    model, _ = metro.load(folder)
    tied = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head)
    assert all(module.weight is model.shared.weight for module in tied)
    assert torch.equal(model.shared.weight, embedding)
    if set(kept) & set(TIED[:2]):  # transformers names the others missing in an encoder
        encoder = MetroT5EncoderModel.from_pretrained(folder)
        assert torch.equal(encoder.shared.weight, embedding)


def test_copies_of_the_embedding_that_differ_are_refused(exported, tmp_path):
    """METRO-T5 has one matrix: with two of them the numbers would be neither's."""
    folder = shutil.copytree(exported("metro_tiny_a"), tmp_path / "folder")
    (folder / "checksums.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["shared.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight"):
        metro.load(folder)


@pytest.mark.parametrize("name", ["metro_tiny_a", "t5_prompt_tiny_f"])
def test_a_checkpoint_loads_as_its_export_does(exported, golden, name):
    """Oracle: the exported folder, loaded by transformers."""
    checkpoint = golden / f"checkpoints/{name}.pt"
    loaded = metro.load(checkpoint, vocab=golden / "tiny_vocab")
    model = AutoModelForSeq2SeqLM.from_pretrained(exported(name))
    assert isinstance(loaded, LoadedModel)
    assert all(torch.equal(loaded.model.state_dict()[n], t) for n, t in model.state_dict().items())
    assert loaded.model.lm_head.weight is loaded.model.shared.weight
    assert loaded.model.generation_config.eos_token_id == model.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(exported(name))
    text = "Homarus gammarus, the European lobster."
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_loaded_checkpoint_does_not_change_with_its_file(golden, tmp_path):
    """Oracle: the weights as they were before the training wrote its next checkpoint there."""
    path = tmp_path / "checkpoint_last.pt"
    shutil.copyfile(golden / "checkpoints/t5_tiny_c.pt", path)
    model, _ = metro.load(path, vocab=golden / "tiny_vocab")
    before = model.shared.weight.clone()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model.shared.weight, before)


def test_any_other_seq2seq_model_loads_too(golden, tmp_path):
    """Oracle: transformers' own T5 with the same weights."""
    from transformers import AutoConfig, T5ForConditionalGeneration

    fields = json.loads((golden / "flipped/tiny_t5_config.json").read_text())
    config = AutoConfig.for_model("t5", **{k: v for k, v in fields.items() if k != "model_type"})
    original = T5ForConditionalGeneration(config)
    original.save_pretrained(tmp_path)
    shutil.copyfile(golden / "tiny_vocab/sp.model", tmp_path / "spiece.model")
    tokenizer_config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    model, _ = metro.load(tmp_path)
    assert type(model) is T5ForConditionalGeneration and not model.training
    assert all(torch.equal(model.state_dict()[n], t) for n, t in original.state_dict().items())


@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_models_of_encoder_or_decoder_alone_are_refused(tmp_path, kind):
    """Oracle: the message, from the configuration alone: there are no weights to read."""
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=f"a model of type {kind.lower()}, without encoder and dec"):
        metro.load(tmp_path / "m")


def test_dtype_and_attention_are_as_asked(hub_folder):
    """Oracle: the model's own attributes."""
    folder = hub_folder("metro_tiny_a")
    model, _ = metro.load(folder, dtype="bf16", attn_implementation="eager", device="cpu")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert resolve_dtype("float16") == torch.float16 and resolve_dtype("auto") is None
    with pytest.raises(ValueError, match="int8.*use float32"):
        resolve_dtype("int8")


@pytest.mark.parametrize("has_products, wanted", [(True, torch.bfloat16), (False, torch.float32)])
def test_fast_is_bfloat16_where_the_cpu_multiplies_it_faster(
    monkeypatch, hub_folder, has_products, wanted
):
    monkeypatch.setattr("metro.models.loading.cpu_multiplies_bf16", lambda: has_products)
    model, _ = metro.load(hub_folder("metro_tiny_a"), dtype="fast")
    assert model.dtype == wanted


@pytest.mark.parametrize(
    "placed, capability, wanted",
    [
        (("cuda:1", None, None), (8, 0), torch.bfloat16),
        (("cuda", None, None), (7, 5), torch.float32),
        ((None, "auto", None), (9, 0), torch.bfloat16),
        ((None, None, "4bit"), (9, 0), torch.bfloat16),
        ((None, {"encoder": "cpu", "decoder": 0}, None), (9, 0), torch.bfloat16),
        ((None, {"": "cpu"}, None), (9, 0), torch.float32),
        ((None, None, None), (9, 0), torch.float32),
    ],
)
def test_fast_is_bfloat16_on_gpus_that_have_it(monkeypatch, placed, capability, wanted):
    """Which emulate it do not have it. The CPU here multiplies float32 faster."""
    monkeypatch.setattr("metro.models.loading.cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_dtype(*placed) == wanted


def test_a_wrong_device_is_refused_whatever_the_type(hub_folder):
    folder = hub_folder("metro_tiny_a")
    with pytest.raises((ValueError, RuntimeError), match="gpu") as plain:
        metro.load(folder, device="gpu", dtype="fp32")
    with pytest.raises(type(plain.value), match="gpu"):
        metro.load(folder, device="gpu", dtype="fast")


def test_a_sharded_folder_loads(exported, tmp_path):
    """Oracle: the same weights in one file."""
    model, tokenizer = metro.load(exported("metro_tiny_a"))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    again = metro.load(tmp_path).model
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["MetroT5", "T5"])
def test_a_model_saved_without_its_tokenizer_is_refused(tmp_path, kind):
    """Transformers makes an empty T5 tokenizer, which reads every text as unknown tokens."""
    sizes = dict(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    package = metro if kind == "MetroT5" else transformers
    config = getattr(package, f"{kind}Config")(**sizes)
    getattr(package, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer: save it beside the model"):
        metro.load(tmp_path)


def test_names_in_an_index_stay_in_the_folder(exported, tmp_path):
    """Oracle: whole weights beside the folder, which its index names."""
    shutil.copytree(exported("metro_tiny_a"), tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"shared.weight": "../model.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    for use in (metro.load, lambda folder: to_fairseq(folder, tmp_path / "x.pt")):
        with pytest.raises(UserError, match="'../model.safetensors' leads out of"):
            use(tmp_path / "model")


@pytest.mark.parametrize("content", ["{ broken", "[]", '{"eos_token_id": "x"}', "\0\0\0"])
def test_damaged_generation_settings_are_named(exported, tmp_path, content):
    folder = tmp_path / "model"
    shutil.copytree(exported("metro_tiny_a"), folder)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match="generation_config.json") as refused:
        metro.load(folder)
    assert "\n" not in str(refused.value)
    (folder / "generation_config.json").unlink()
    assert metro.load(folder).model.generation_config.eos_token_id == 2


def test_a_resized_and_padded_vocabulary_generates_samples_and_converts(exported, tmp_path):
    """Oracle: rows of no token, made the most probable, are never drawn; the rest is the same."""
    model, tokenizer = metro.load(exported("t5_prompt_tiny_f"))
    before = model.shared.weight.detach().clone()
    tokenizer.add_tokens(["[ENT]"])
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    with torch.no_grad():
        model.shared.weight[len(tokenizer) :] = 0
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    loaded = metro.load(tmp_path / "padded")
    assert loaded.model.config.vocab_size > len(loaded.tokenizer) == len(before) + 1
    options = {"max_new_tokens": 20, "sample": True, "temperature": 1e9, "num_answers": 8}
    drawn: set[int] = set()
    loaded.model.register_forward_pre_hook(
        lambda _, args, kw: drawn.update(kw["decoder_input_ids"].flatten().tolist()),
        with_kwargs=True,
    )
    [answers] = metro.generate(loaded, "a text", progress=False, **options)
    assert len(answers) == 8 and len(drawn) > 100 and max(drawn) < len(loaded.tokenizer)
    done = to_fairseq(tmp_path / "padded", tmp_path / "x.pt")
    assert done.dropped == ["1 added tokens: [ENT]", "23 rows that pad the embedding"]
    checkpoint = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(checkpoint["model"]["encoder.embed_tokens.weight"], before)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("metro_t0_bas", "did you mean 'metro_t0_base'"),
        ("nothing_of_this_name", "metro models"),
        ("./no/such/folder", "no file or folder"),
    ],
)
def test_an_unknown_name_is_refused_with_what_may_have_been_meant(name, remedy):
    with pytest.raises(ValueError, match=remedy):
        metro.load(name)


def test_a_training_folder_is_refused_naming_its_checkpoint(tmp_path):
    (tmp_path / "checkpoint_last.pt").touch()
    with pytest.raises(ValueError, match="no config.json.*checkpoint_last.pt"):
        metro.load(tmp_path)


def test_vocab_belongs_to_checkpoints_alone(exported, golden):
    with pytest.raises(ValueError, match="leave vocab out"):
        metro.load(exported("metro_tiny_a"), vocab=golden / "tiny_vocab")


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    """Oracle: the Hugging Face hub's own offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hub.*copy its folder here") as error:
        metro.load("somebody/no-such-model")
    assert "\n" not in str(error.value)
