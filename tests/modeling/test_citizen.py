"""METRO-T5 does what users of transformers expect of a model.

Oracle, unless a test says otherwise: the same model used in the plainest way (no cache, no padding,
eager attention, float32, one process, one file).
"""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from metro.modeling.modeling_metro_t5 import MetroT5EncoderModel, MetroT5ForConditionalGeneration
from tests.modeling.conftest import IDS, LABELS, MASK, PAD, answers, tiny


@pytest.mark.client("PyTorch", "eager and SDPA attention")
def test_eager_and_sdpa_attention_agree(model_and_inputs):
    """Outputs and gradients, also after switching."""
    model, ids, mask = model_and_inputs
    labels = ids.masked_fill(ids.eq(PAD), -100)
    found = {}
    for implementation in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        output = model(ids, mask, labels=labels)
        output.loss.backward()
        gradients = [weight.grad.clone() for weight in model.parameters()]
        if implementation in found:
            assert torch.equal(output.logits, found[implementation][0])
        found[implementation] = (output.logits.detach(), gradients)
    torch.testing.assert_close(found["eager"][0], found["sdpa"][0], atol=3e-5, rtol=1e-5)
    for eager, sdpa in zip(found["eager"][1], found["sdpa"][1], strict=True):
        torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=1e-3)


def test_attention_implementation_is_chosen_at_loading(tmp_path):
    tiny().save_pretrained(tmp_path)
    load = MetroT5ForConditionalGeneration.from_pretrained
    assert load(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(tmp_path).config._attn_implementation == "sdpa"
    with pytest.raises((ValueError, ImportError)):
        load(tmp_path, attn_implementation="flash_attention_2")


def test_attention_weights_are_returned_and_sum_to_one():
    model = tiny()
    output = model(IDS, MASK, labels=LABELS, output_attentions=True, output_hidden_states=True)
    for weights, keys in ((output.encoder_attentions, MASK), (output.cross_attentions, MASK)):
        assert len(weights) == 2
        for weight in weights:
            torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)))
            hidden_keys = weight * (1 - keys)[:, None, None, :]
            assert hidden_keys[:2].abs().max() < 1e-6
    assert len(output.decoder_hidden_states) == len(output.encoder_hidden_states) == 3
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert output.decoder_attentions[0].triu(1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [MetroT5ForConditionalGeneration, MetroT5EncoderModel])
def test_flags_of_the_configuration_count_and_arguments_come_first(kind):
    """Oracle: the same call with the flag as an argument."""
    model = kind(tiny().config).eval()
    model.set_attn_implementation("eager")
    labels = {"labels": LABELS} if kind is MetroT5ForConditionalGeneration else {}
    for flag in ("output_hidden_states", "output_attentions"):
        plain, asked = model(IDS, MASK, **labels), model(IDS, MASK, **labels, **{flag: True})
        setattr(model.config, flag, True)
        found = model(IDS, MASK, **labels)
        refused = model(IDS, MASK, **labels, **{flag: False})
        setattr(model.config, flag, False)
        assert found.keys() == asked.keys() > plain.keys() == refused.keys()
    model.config.return_dict = False
    as_tuple, as_dict = model(IDS, MASK, **labels), model(IDS, MASK, **labels, return_dict=True)
    assert isinstance(as_tuple, tuple) and not isinstance(as_dict, tuple)
    assert all(
        torch.equal(found, kept) for found, kept in zip(as_tuple, as_dict.to_tuple(), strict=True)
    )
    assert isinstance(model.get_encoder()(IDS, MASK), tuple)


SOME = dict.fromkeys(
    ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head", "decoder.block"], "disk"
)
SOME |= {f"{stack}.{part}": "cpu" for stack in ("encoder", "decoder")
         for part in ("pos_embed", "first_layer_norm")}  # fmt: skip
SOME["encoder.block"] = "cpu"


@pytest.mark.parametrize("device_map", ["auto", SOME])
@pytest.mark.client("accelerate", "`device_map` with weights on CPU and disk")
def test_offloaded_weights_answer_as_those_in_memory(tmp_path, device_map):
    """On the disk all of them, or some."""
    pytest.importorskip("accelerate")
    model = tiny()
    model.save_pretrained(tmp_path)
    offloaded = MetroT5ForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, max_memory={"cpu": "0MB"}, offload_folder=tmp_path / "disk"
    )
    assert "disk" in offloaded.hf_device_map.values()
    weights = (offloaded.decoder.block[0].layer[0].SelfAttention.q.weight, offloaded.shared.weight)
    assert any(weight.device.type == "meta" for weight in weights)
    assert torch.equal(answers(offloaded, IDS, MASK), answers(model, IDS, MASK))
    expected = model(IDS, MASK, labels=LABELS)
    found = offloaded(IDS, MASK, labels=LABELS)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    encoder = MetroT5EncoderModel.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": "0MB"}, offload_folder=tmp_path / "disk"
    )
    states = encoder(IDS, MASK).last_hidden_state
    assert torch.equal(states, expected.encoder_last_hidden_state)


@pytest.mark.client("PyTorch", "bfloat16 and autocast")
def test_bf16_stays_close_to_fp32_and_generates(model_and_inputs, tmp_path):
    """Oracle: float32; bfloat16 keeps 8 bits, a few layers lose some of them."""
    model, ids, mask = model_and_inputs
    labels = ids.masked_fill(ids.eq(PAD), -100)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected, found = model(ids, mask, labels=labels), half(ids, mask, labels=labels)
    assert found.logits.dtype == torch.bfloat16 and found.loss.dtype == torch.float32
    scale = expected.logits.abs().max()
    assert (found.logits.float() - expected.logits).abs().max() < 0.05 * scale
    assert abs(found.loss - expected.loss) < 0.05 * expected.loss
    cached, plain = (answers(half, ids, mask, use_cache=cache) for cache in (True, False))
    assert cached.shape[0] == plain.shape[0] == len(ids)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(ids, mask, labels=labels)
    assert (autocast.logits.float() - expected.logits).abs().max() < 0.05 * scale


def switch_checkpointing(model, how: str, *arguments) -> None:
    """Under the name that transformers 5.23 wants, or the older one."""
    old = getattr(model, f"gradient_checkpointing_{how}")
    getattr(model, f"activation_checkpointing_{how}", old)(*arguments)
    if how == "enable":
        model.enable_input_require_grads()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.client("PyTorch", "gradient checkpointing")
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, dropout):
    model = tiny(dropout_rate=dropout).train()
    gradients, calls = [], []
    layer = model.encoder.block[0].layer[0]
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            switch_checkpointing(model, "enable", {"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model.zero_grad()
        model(IDS, MASK, labels=LABELS).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert len(calls) == 3  # once plainly, twice when checkpointed
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5, msg=name)
    switch_checkpointing(model, "disable")
    assert model.eval()(IDS, MASK, IDS).past_key_values is not None


def run_compiled(backend: str, num_layers: int):
    model = tiny(num_layers=num_layers)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    output = compiled(IDS, MASK, labels=LABELS)
    output.loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    expected = model(IDS, MASK, labels=LABELS)
    expected.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.client("torch.compile", "one graph, forward and backward")
def test_compiled_in_one_graph_it_computes_the_same():
    run_compiled("eager", num_layers=2)


@pytest.mark.slow
def test_compiled_to_machine_code_it_computes_the_same():
    run_compiled("inductor", num_layers=1)


@pytest.mark.client("Trainer", "`Seq2SeqTrainer` with `DataCollatorForSeq2Seq`")
def test_trainer_takes_the_step_that_sgd_takes(tmp_path):
    """Oracle: one step of plain SGD on the mean over all labels, written by hand."""
    model, rate = tiny(), 0.1
    plain = copy.deepcopy(model).train()
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "labels": [t for t in labels.tolist() if t >= 0]}
        for ids, mask, labels in zip(IDS, MASK, LABELS, strict=True)
    ]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=3, learning_rate=rate,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True,
        predict_with_generate=True, generation_max_length=8, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(_Padder(), model=model),
    )  # fmt: skip
    loss = trainer.train().training_loss
    expected = plain(IDS, MASK, labels=LABELS).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, weight), old in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, old - rate * old.grad, atol=1e-6, rtol=1e-5, msg=name)
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == 3
    assert predicted.metrics["test_loss"] != pytest.approx(loss, rel=1e-3)


class _Padder:
    """What DataCollatorForSeq2Seq needs of a tokenizer."""

    padding_side = "right"
    pad_token_id = PAD

    def pad(self, features, return_tensors=None, **_):
        length = max(len(feature["input_ids"]) for feature in features)
        rows = [f["input_ids"] + [PAD] * (length - len(f["input_ids"])) for f in features]
        batch = {"input_ids": torch.tensor(rows)}
        batch["attention_mask"] = batch["input_ids"].ne(PAD).long()
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch


@pytest.mark.client("PEFT", "LoRA trains, saves, loads and merges")
def test_lora_trains_a_step_and_merges(tmp_path):
    """Merged weights answer as base and adapter together; only the adapter has moved."""
    peft = pytest.importorskip("peft")
    base = tiny()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q", "v"]
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).train()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * (2 + 4)  # A and B on q and v of 2 encoder, 4 decoder attentions
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=5.0)
    for _ in range(2):  # the first moves B alone, as A's gradient is zero while B is
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
        with model.disable_adapter():
            plain = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    assert adapted.loss < plain.loss - 1e-3
    generated = model.generate(
        input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False
    )
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    assert isinstance(merged, MetroT5ForConditionalGeneration)
    with torch.no_grad():
        found = merged(IDS, MASK, labels=LABELS).logits
    torch.testing.assert_close(found, adapted.logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(answers(merged, IDS, MASK, max_new_tokens=6), generated)
    changed = [n for n, t in merged.state_dict().items() if not torch.equal(t, before[n])]
    assert {name.split(".")[-2] for name in changed} == {"q", "v"}
    again = tiny()
    again.load_state_dict(before)
    with torch.no_grad():
        reloaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
        found = reloaded(input_ids=IDS, attention_mask=MASK, labels=LABELS).logits
    torch.testing.assert_close(found, adapted.logits, atol=1e-6, rtol=1e-6)


def assert_same_and_tied(found, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    tied = (found.lm_head, found.encoder.embed_tokens, found.decoder.embed_tokens)
    assert all(module.weight is found.shared.weight for module in tied)


@pytest.mark.client("from_pretrained", "weights in shards")
def test_a_model_saved_in_shards_loads_whole(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not list(tmp_path.glob("*.bin"))
    loaded, info = MetroT5ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_and_tied(loaded, model)
    shards[0].unlink()
    with pytest.raises((OSError, ValueError)):
        MetroT5ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [75, 45])
@pytest.mark.client("from_pretrained", "`resize_token_embeddings`")
def test_resized_embeddings_stay_tied_and_save(tmp_path, size):
    """Rows that stay keep their values; the new ones take part; 60 rows before."""
    model = tiny()
    old = model.shared.weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.shared.num_embeddings == size
    assert model.lm_head.out_features == size
    kept = min(size, 60)
    assert torch.equal(model.shared.weight[:kept], old[:kept])
    assert model.encoder.embed_tokens is model.shared is model.decoder.embed_tokens
    ids = IDS.clamp(max=size - 1)
    output = model(ids, MASK, labels=LABELS)
    assert output.logits.shape[-1] == size
    output.loss.backward()
    assert model.shared.weight.grad[kept - 1].abs().sum() > 0
    assert answers(model, ids, MASK).max() < size
    model.save_pretrained(tmp_path)
    assert_same_and_tied(MetroT5ForConditionalGeneration.from_pretrained(tmp_path), model)


def test_a_model_built_without_memory_takes_weights():
    """As models too large for one process are built; ``to_empty`` leaves what was in memory."""
    model = tiny()
    with torch.device("meta"):
        empty = MetroT5ForConditionalGeneration(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(IDS, MASK, IDS).logits, model(IDS, MASK, IDS).logits)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(decoder_maks=MASK), TypeError, "no argument decoder_maks"),
        (dict(input_ids=None), ValueError, "give the encoder input_ids or inputs_embeds"),
        (dict(decoder_input_ids=None), ValueError, "give the decoder input_ids or"),
        (dict(decoder_inputs_embeds=torch.ones(3, 7, 16)), ValueError, "one of the two"),
    ],
)
def test_wrong_arguments_are_named(wrong, error, message):
    """Ignored, they would give other numbers than were asked for."""
    arguments = dict(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)
    with pytest.raises(error, match=message):
        tiny()(**arguments | wrong)


def test_copies_and_pickles_are_the_same_model():
    model = tiny()
    assert_same_and_tied(copy.deepcopy(model), model)
    assert_same_and_tied(pickle.loads(pickle.dumps(model)), model)


@pytest.mark.client("from_pretrained", "Auto classes after `import metro`")
def test_auto_class_builds_from_a_configuration():
    """`import metro` makes the model type known."""
    import metro  # noqa: F401

    model = AutoModelForSeq2SeqLM.from_config(tiny().config)
    assert isinstance(model, MetroT5ForConditionalGeneration)
