"""METRO-T5 does what users of transformers expect of a model.

Oracle, unless a test says otherwise: the same model used in the plainest way (no cache, no padding,
eager attention, float32, one process, one file).
"""

import copy
import json
import pickle
import warnings

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration

PAD, EOS = 1, 2
IDS = torch.tensor([[0, 7, 8, 9, 10, 11, 2], [0, 30, 31, 2, PAD, PAD, PAD], [0, 40, 2] + [PAD] * 4])
MASK = IDS.ne(PAD).long()
LABELS = torch.tensor([[5, 6, 7, 8, 2], [9, 2, -100, -100, -100], [11, 12, 13, 2, -100]])


def tiny(**changes) -> MetroT5ForConditionalGeneration:
    """A random model whose every weight matters: norms, biases and relative bias are not 1 or 0."""
    sizes = dict(vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
                 max_positions=64, dropout_rate=0.0)  # fmt: skip
    model = MetroT5ForConditionalGeneration(MetroT5Config(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                parameter.sign() * 0.05 + torch.randn(parameter.shape, generator=generator) * 0.3
            )
        model.shared.weight[EOS] *= 2  # so that answers end at different lengths
    return model.eval()


@pytest.fixture(params=["random", "metro_tiny_b", "t5_prompt_tiny_f"])
def model_and_inputs(request):
    """A model with a padded batch: a random one, and released folders with recorded inputs."""
    if request.param == "random":
        return tiny(), IDS, MASK
    import numpy as np

    golden = request.getfixturevalue("testdata") / "golden"
    model = load_released(golden / "hf_export" / request.param)
    arrays = np.load(golden / f"hf_{request.param}.npz")
    return model, torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])


def load_released(folder) -> MetroT5ForConditionalGeneration:
    """A released-layout folder, read with torch alone."""
    fields = json.loads((folder / "config.json").read_text())
    for field in ("model_type", "architectures", "torch_dtype", "transformers_version"):
        del fields[field]
    model = MetroT5ForConditionalGeneration(MetroT5Config(**fields))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def answers(model, ids, mask, **options) -> torch.Tensor:
    torch.manual_seed(5)
    options = {"max_new_tokens": 15, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "length_penalty": 0.5},
        {"num_beams": 4, "num_return_sequences": 3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 20, "temperature": 1.5},
        {"do_sample": True, "num_beams": 3, "top_p": 0.9},
    ],
    ids=["greedy", "beam", "beams", "sampling", "beam sampling"],
)
def test_generation_with_cache_equals_without(model_and_inputs, options):
    model, ids, mask = model_and_inputs
    cached = answers(model, ids, mask, use_cache=True, **options)
    assert torch.equal(cached, answers(model, ids, mask, use_cache=False, **options))
    assert len(cached) == len(ids) * options.get("num_return_sequences", 1)


def test_cached_scores_equal_those_of_one_pass(model_and_inputs):
    """Step by step with a cache = the whole answer at once, position by position."""
    model, ids, mask = model_and_inputs
    out = answers(model, ids, mask, output_scores=True, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model(ids, mask, out.sequences[:, :-1]).logits
    for step, scores in enumerate(out.scores):
        alive = ~out.sequences[:, 1 : step + 1].eq(EOS).any(1)
        assert alive.any()
        torch.testing.assert_close(scores[alive], logits[alive, step], atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_a_cache_of_a_fixed_size_gives_the_same(model_and_inputs, options):
    model, ids, mask = model_and_inputs
    options |= {"disable_compile": True}
    fixed = answers(model, ids, mask, cache_implementation="static", **options)
    assert torch.equal(fixed, answers(model, ids, mask, **options))


@pytest.mark.parametrize("cache", ["static", "dynamic", None])
def test_an_answer_whose_beginning_is_padded_is_continued(cache):
    """Oracle: each row alone, without padding and without a cache."""
    model = tiny()
    begun = torch.tensor([[PAD, EOS, 5], [EOS, 6, 7]])
    options = {"eos_token_id": -1, "max_new_tokens": 6}
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    found = answers(
        model, IDS[:2], MASK[:2], decoder_input_ids=begun,
        decoder_attention_mask=begun.ne(PAD).long(), **how, **options,
    )  # fmt: skip
    for row in range(2):
        start = begun[row : row + 1, 1 - row :]
        alone = answers(model, IDS[row : row + 1], MASK[row : row + 1], decoder_input_ids=start,
                        use_cache=False, **options)  # fmt: skip
        assert torch.equal(found[row, 1 - row :], alone[0])


def test_compiled_decoding_is_one_graph_and_gives_the_same():
    from torch._dynamo.utils import counters
    from transformers.generation import CompileConfig

    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True  # by itself transformers compiles on GPUs alone
    torch._dynamo.reset()
    counters.clear()
    model = tiny()
    found = answers(model, IDS, MASK, cache_implementation="static", compile_config=config)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert torch.equal(found, answers(model, IDS, MASK))


def test_a_fixed_cache_longer_than_the_positions_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="longer than max_positions \\(64\\)"):
        answers(model, IDS, MASK, cache_implementation="static", max_new_tokens=70)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_equals_its_single_rows(model_and_inputs, side):
    model, ids, mask = model_and_inputs
    lengths = mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    singles = [row[:length].unsqueeze(0) for row, length in zip(ids, lengths, strict=True)]
    if side == "left":
        ids = torch.stack([row.roll(len(row) - n) for row, n in zip(ids, lengths, strict=True)])
        mask = ids.ne(PAD).long()
    batch = answers(model, ids, mask, num_beams=2)
    with torch.no_grad():
        logits = model(ids, mask, batch).logits
    for row, (single, answer) in enumerate(zip(singles, batch, strict=True)):
        alone = answers(model, single, torch.ones_like(single), num_beams=2)[0]
        assert torch.equal(answer[: len(alone)], alone)
        assert answer[len(alone) :].eq(PAD).all()
        with torch.no_grad():
            expected = model(single, None, answer.unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits[row], expected, atol=3e-5, rtol=1e-5)


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


def test_bf16_stays_close_to_fp32_and_generates(model_and_inputs, tmp_path):
    """Oracle: float32; bfloat16 keeps 8 bits, a few layers lose some of them."""
    model, ids, mask = model_and_inputs
    labels = ids.masked_fill(ids.eq(PAD), -100)
    model.save_pretrained(tmp_path)
    half = MetroT5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
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
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, dropout):
    model = tiny(dropout_rate=dropout).train()
    gradients, calls = [], []
    block = model.encoder.block[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo tells of the remembered table of buckets
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


def test_compiled_in_one_graph_it_computes_the_same():
    run_compiled("eager", num_layers=2)


@pytest.mark.slow
def test_compiled_to_machine_code_it_computes_the_same():
    run_compiled("inductor", num_layers=1)


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
    assert len(trained) == 2 * 2 * (
        2 + 2 * 2
    )  # A and B on q and v of 2 encoder, 4 decoder attentions
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
    changed = {
        name
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
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


def test_encoded_once_the_input_serves_many_answers():
    model = tiny()
    with torch.no_grad():
        encoded = model.get_encoder()(IDS, MASK)
        found = model(attention_mask=MASK, encoder_outputs=encoded, decoder_input_ids=IDS).logits
        as_tuple = model(
            attention_mask=MASK, encoder_outputs=(encoded[0],), decoder_input_ids=IDS
        ).logits
        embedded = model(
            inputs_embeds=model.shared(IDS), attention_mask=MASK, decoder_input_ids=IDS
        ).logits
        expected = model(IDS, MASK, IDS).logits
    assert torch.equal(found, expected) and torch.equal(as_tuple, expected)
    assert torch.equal(embedded, expected)
    plain = answers(model, IDS, MASK)
    given = model.generate(
        encoder_outputs=BaseModelOutput(encoded[0]), attention_mask=MASK,
        max_new_tokens=15, do_sample=False,
    )  # fmt: skip
    assert torch.equal(given, plain)


def test_an_answer_can_be_continued():
    """Oracle: greedy search from the start, of which the beginning is given."""
    model = tiny()
    whole = answers(model, IDS[:1], MASK[:1], eos_token_id=-1, max_new_tokens=12)
    rest = answers(model, IDS[:1], MASK[:1], eos_token_id=-1, max_new_tokens=7,
                   decoder_input_ids=whole[:, :6])  # fmt: skip
    assert torch.equal(rest, whole)


def test_generation_config_is_saved_and_used(tmp_path):
    model = tiny()
    model.generation_config.max_new_tokens = 4
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    loaded = MetroT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.num_beams) == (4, 2)
    found = loaded.generate(IDS, attention_mask=MASK)
    assert torch.equal(found, answers(model, IDS, MASK, max_new_tokens=4, num_beams=2))


def test_copies_and_pickles_are_the_same_model():
    model = tiny()
    assert_same_and_tied(copy.deepcopy(model), model)
    assert_same_and_tied(pickle.loads(pickle.dumps(model)), model)


def test_too_long_an_input_is_refused_with_the_length():
    model = tiny()
    ids = torch.full((1, 65), 7)
    with pytest.raises(ValueError, match=r"65 tokens is longer than max_positions \(64\)"):
        model(ids, None, IDS[:1])
    with pytest.raises(ValueError, match="longer than max_positions"):
        answers(model, IDS[:1], MASK[:1], max_new_tokens=70, eos_token_id=-1)


def test_auto_class_builds_from_a_configuration():
    """`import metro` makes the model type known."""
    import metro  # noqa: F401

    model = AutoModelForSeq2SeqLM.from_config(tiny().config)
    assert isinstance(model, MetroT5ForConditionalGeneration)
