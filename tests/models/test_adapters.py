"""Adapters of PEFT are models for every command.

Oracle, unless a test says otherwise: base model and adapter as PEFT itself runs them, not merged.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import metro
from metro.cli.main import load_command
from metro.utils.messages import UserError
from tests.evaluation.toy import write_suite
from tests.finetuning.prepared import write_prepared

peft = pytest.importorskip("peft")

TEXTS = ["is the sky blue?", "a b c"]


@pytest.fixture(scope="module")
def base(exported):
    return exported("t5_prompt_tiny_f")


@torch.no_grad()
def randomized(adapted):
    """PEFT's adapters begin as no change; these change a lot."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.3 * parameter.std(correction=0).clamp(min=0.1) * noise
    return adapted.eval()


def adapt(base, out, config=None, **lora):
    """Save an adapter of a model (its place or itself); return it with its tokenizer."""
    model, tokenizer = base if isinstance(base, tuple) else metro.load(base)
    config = config or peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, **lora)
    torch.manual_seed(0)
    adapted = randomized(peft.get_peft_model(model, config))
    adapted.save_pretrained(out)
    return adapted, tokenizer


@torch.no_grad()
def logits(model, tokenizer):
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids = inputs["input_ids"]
    return model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=ids).logits


def assert_equal_but_not_to(found, expected, base):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (expected - base).abs().max() > 0.05


@pytest.mark.parametrize(
    "config",
    [
        dict(),  # METRO-T5's default modules
        dict(target_modules="all-linear", use_dora=True, lora_bias=False),
        dict(target_modules=["q", "wo"], use_rslora=True, rank_pattern={"wo": 3}),
        peft.IA3Config(task_type="SEQ_2_SEQ_LM"),
        peft.LoHaConfig(r=2),
        peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False),
        dict(target_modules=["v"], modules_to_save=["relative_attention_bias"]),
    ],
    ids=["lora", "dora", "rslora", "ia3", "loha", "oft", "whole modules"],
)
@pytest.mark.client("PEFT", "folders of LoRA, DoRA, IA3, LoHa, OFT are models")
def test_a_loaded_adapter_computes_what_peft_computes(base, tmp_path, config):
    before = logits(*metro.load(base))
    given = config if isinstance(config, peft.PeftConfig) else None
    adapted, tokenizer = adapt(base, tmp_path / "a", given, **({} if given else config))
    model, _ = metro.load(tmp_path / "a")
    assert_equal_but_not_to(logits(model, tokenizer), logits(adapted, tokenizer), before)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.client("PEFT", "`LoraConfig` without `target_modules`")
def test_lora_changes_queries_and_values_by_default(base, tmp_path):
    """Oracle: PEFT's table, which has T5."""
    adapted, _ = adapt(base, tmp_path / "a")
    assert adapted.peft_config["default"].target_modules == {"q", "v"}


def test_the_base_may_be_any_model(base, golden, tmp_path):
    """A fairseq checkpoint, an adapter, and a folder beside the adapter."""
    checkpoint, vocab = golden / "checkpoints/t5_prompt_tiny_f.pt", golden / "tiny_vocab"
    before = logits(*metro.load(base))
    first = tmp_path / "first"
    adapted, tokenizer = adapt(metro.load(checkpoint, vocab=vocab), first)
    found = logits(metro.load(first, vocab=vocab).model, tokenizer)
    assert_equal_but_not_to(found, logits(adapted, tokenizer), before)
    with pytest.raises(UserError, match="vocab is .* not a fairseq checkpoint"):
        adapt(base, tmp_path / "plain")
        metro.load(tmp_path / "plain", vocab=vocab)

    adapt(base, first)
    second, _ = adapt(metro.load(first), tmp_path / "second")
    assert second.peft_config["default"].base_model_name_or_path == str(first)
    found = logits(metro.load(tmp_path / "second").model, tokenizer)
    assert_equal_but_not_to(found, logits(second, tokenizer), logits(*metro.load(first)))

    shutil.copytree(base, first / "base")
    change(first, base_model_name_or_path="base")
    assert torch.equal(logits(*metro.load(first)), logits(*metro.load(first)))


def test_an_adapter_of_the_hub_is_taken_from_its_cache(base, tmp_path, monkeypatch):
    """Without a network; the cache is laid out as huggingface_hub does."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached, commit = tmp_path / "models--someone--adapter", "a" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    adapted, tokenizer = adapt(base, cached / "snapshots" / commit)
    model, _ = metro.load("someone/adapter")
    assert_equal_but_not_to(
        logits(model, tokenizer), logits(adapted, tokenizer), logits(*metro.load(base))
    )
    assert model.name_or_path == "someone/adapter"
    with pytest.raises(UserError, match="someone/another is neither a folder nor in the cache"):
        metro.load("someone/another")


def test_an_adapter_brings_its_own_tokens(tmp_path, golden):
    """A T5 with two more tokens, whose embedding PEFT saves with the adapter."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    tokenizer = word_tokenizer()
    config = T5Config(d_model=16, vocab_size=20, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                      pad_token_id=1, decoder_start_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    place = tmp_path / "t5"
    T5ForConditionalGeneration(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    model, tokenizer = metro.load(place)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens(["<new>", "<other>"])
    model.resize_token_embeddings(22, mean_resizing=False)
    adapted, _ = adapt((model, tokenizer), tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    again, reader = metro.load(tmp_path / "a")
    assert reader.convert_tokens_to_ids("<other>") == 21 and again.config.vocab_size == 22
    torch.testing.assert_close(logits(again, reader), logits(adapted, tokenizer))


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "<pad>", "<unk>", *"abcdefghijklmnopq"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def change(folder, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def without_first(tensors):
    return dict(list(tensors.items())[1:])


def with_another(tensors):
    return {**tensors, "base_model.model.encoder.other.lora_A.weight": torch.zeros(2, 2)}


def wider(tensors):
    return {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}


DAMAGES = {
    "lacks a tensor": (
        lambda folder: change_tensors(folder, without_first),
        r"missing: base_model\.model\.",
    ),
    "has another tensor": (
        lambda folder: change_tensors(folder, with_another),
        "unexpected: base_model.model.encoder.other",
    ),
    "of another size": (lambda folder: change_tensors(folder, wider), "wrong shape: .* instead of"),
    "without weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no weights",
    ),
    "damaged weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345678"),
        "is damaged",
    ),
    "no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "adapter_config.json is not the JSON file",
    ),
    "no base": (
        lambda folder: change(folder, base_model_name_or_path=None),
        "names no base model: write it",
    ),
    "base is gone": (
        lambda folder: change(folder, base_model_name_or_path="/gone/model"),
        "adapter_config.json, base_model_name_or_path: there is no file or folder /gone/model",
    ),
    "its own base": (
        lambda folder: change(folder, base_model_name_or_path=str(folder)),
        "cannot be its own base model",
    ),
    "beside a model": (
        lambda folder: (folder / "model.safetensors").touch(),
        "holds a whole model .* and an adapter",
    ),
    "unknown kind": (lambda folder: change(folder, peft_type="NEW"), "'NEW', which peft does not"),
    "cannot be merged": (
        lambda folder: change(folder, peft_type="PROMPT_TUNING", num_virtual_tokens=2),
        "type PROMPT_TUNING, which cannot be merged",
    ),
    "of a classifier": (lambda folder: change(folder, task_type="SEQ_CLS"), "the task SEQ_CLS"),
    "imports a module": (
        lambda folder: change(folder, megatron_config={"a": 1}, megatron_core="antigravity"),
        "megatron_config",
    ),
    "other modules": (
        lambda folder: change(folder, target_modules=["query"]),
        "does not fit MetroT5ForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(base, tmp_path, damage):
    adapt(base, tmp_path / "a")
    harm, message = DAMAGES[damage]
    harm(tmp_path / "a")
    with pytest.raises(UserError, match=message) as caught:
        metro.load(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_adapters_of_each_other_are_refused_in_one_line(base, tmp_path, monkeypatch):
    """As folders, and as ids of the hub whose cache holds them."""
    first, second = tmp_path / "first", tmp_path / "second"
    adapt(base, first)
    shutil.copytree(first, second)
    change(first, base_model_name_or_path=str(second))
    change(second, base_model_name_or_path=str(first))
    for folder in (first, second):
        with pytest.raises(UserError, match="again: an adapter cannot be its own base") as caught:
            metro.load(folder)
        assert "\n" not in str(caught.value)
    folders = {"some/first": first, "some/second": second}
    monkeypatch.setattr("metro.models.loading.adapter_folder", folders.get)
    monkeypatch.setattr("metro.models.loading.use_cache_without_network", lambda: None)
    change(first, base_model_name_or_path="some/second")
    change(second, base_model_name_or_path="some/first")
    with pytest.raises(UserError, match="again: an adapter cannot be its own base"):
        metro.load("some/first")


def test_an_adapter_of_the_tied_projection_is_refused(base, tmp_path):
    """Merged into the one matrix it would change the embedding too."""
    adapt(base, tmp_path / "a", target_modules=["lm_head"])
    with pytest.raises(UserError, match="adapts lm_head, whose weights are also those of another"):
        metro.load(tmp_path / "a")


def run(command: str, *arguments) -> None:
    load_command(command)([str(argument) for argument in arguments], standalone_mode=False)


def test_commands_take_an_adapter(base, tmp_path, capsys):
    """generate, convert (which merges), and both ways of naming what is not convertible."""
    adapter, merged = tmp_path / "a", tmp_path / "merged"
    adapted, tokenizer = adapt(base, adapter)
    run("convert", "to-hf", adapter, "--out", merged)
    assert "merged" in capsys.readouterr().out
    torch.testing.assert_close(
        logits(metro.load(merged).model, tokenizer),
        logits(adapted, tokenizer),
        atol=2e-5,
        rtol=1e-4,
    )
    assert (merged / "modeling_metro_t5.py").is_file()
    answers = []
    for model in (adapter, merged, base):
        run("generate", model, *TEXTS, "--num-beams", 4, "--num-answers", 4)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(UserError, match="whole model in Hugging Face's form already"):
        run("convert", "to-hf", base, "--out", tmp_path / "again")
    with pytest.raises(UserError, match="merge it into its base model first, with `metro convert"):
        run("convert", "to-fairseq", adapter, "--out", tmp_path / "back.pt")
    with pytest.raises(UserError, match="--keep-auxiliary and --cased are for fairseq"):
        run("convert", "to-hf", adapter, "--out", tmp_path / "x", "--cased")


@pytest.mark.parametrize("changed", ["adapter", "base"])
def test_an_evaluation_is_of_base_and_adapter(base, tmp_path, changed):
    """Scores are those of the merged model, and a run of other weights is not resumed."""
    own_base, adapter = tmp_path / "base", tmp_path / "a"
    shutil.copytree(base, own_base)
    (own_base / "checksums.json").unlink()
    adapt(own_base, adapter)
    suite = write_suite(tmp_path / "suite")
    options = dict(suite=str(suite), out=tmp_path / "out", tasks=["truth"], progress=False)
    evaluation = metro.evaluate(str(adapter), **options)
    run("convert", "to-hf", adapter, "--out", tmp_path / "merged")
    merged = metro.evaluate(str(tmp_path / "merged"), **options)
    plain = metro.evaluate(str(base), run_name="plain", **options)
    scores = [next(e.folder.rglob("scores/*/*.jsonl")).read_text() for e in (evaluation, merged)]
    assert scores[0] == scores[1] != next(plain.folder.rglob("scores/*/*.jsonl")).read_text()
    path = {
        "adapter": adapter / "adapter_model.safetensors",
        "base": own_base / "model.safetensors",
    }
    save_file({name: t * 1.01 for name, t in load_file(path[changed]).items()}, path[changed],
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="other weights"):
        metro.evaluate(str(adapter), **options)


def test_finetuning_begins_with_base_and_adapter(base, tmp_path):
    """Oracle: the same run that begins with the merged model."""
    adapt(base, tmp_path / "a")
    run("convert", "to-hf", tmp_path / "a", "--out", tmp_path / "merged")
    data = write_prepared(tmp_path / "data", 40)
    found = []
    for model in ("a", "merged"):
        out = tmp_path / f"finetuned-{model}"
        options = dict(max_steps=2, batch_size=4, use_cpu=True, report_to="none", progress=False)
        metro.finetune(model=str(tmp_path / model), data=str(data), output_dir=str(out), **options)
        found.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
