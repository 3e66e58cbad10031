"""METRO-T5 writes the same answers however they are asked for.

Oracle, unless a test says otherwise: the same model used in the plainest way (no cache, no padding,
one input at a time).
"""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from tests.modeling.conftest import EOS, IDS, MASK, PAD, answers, each_model_and_t5, tiny


@each_model_and_t5
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
@pytest.mark.client("generate", "greedy and beam search, sampling, with cache and without")
def test_generation_with_cache_equals_without(model_and_inputs, options):
    model, ids, mask = model_and_inputs
    cached = answers(model, ids, mask, use_cache=True, **options)
    assert torch.equal(cached, answers(model, ids, mask, use_cache=False, **options))
    assert len(cached) == len(ids) * options.get("num_return_sequences", 1)


@each_model_and_t5
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


@each_model_and_t5
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
@pytest.mark.client("generate", "`cache_implementation=static`")
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


@pytest.mark.client("torch.compile", "`generate`")
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


@each_model_and_t5
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
    embeds = model.shared(IDS)
    embedded = model.generate(
        inputs_embeds=embeds, attention_mask=MASK, max_new_tokens=15, do_sample=False
    )
    assert torch.equal(given, plain) and torch.equal(embedded, plain)


@pytest.mark.parametrize("how", ["a smaller model", "the input"])
@pytest.mark.client("generate", "assisted by a smaller model or by the input")
def test_an_assisted_answer_is_the_greedy_one(how):
    model, options = tiny(), {"prompt_lookup_num_tokens": 2}
    if how == "a smaller model":
        options = {"assistant_model": tiny(num_layers=1)}
    for ids in IDS[:1], IDS[1:2, :4]:
        found = answers(model, ids, torch.ones_like(ids), **options)
        assert torch.equal(found, answers(model, ids, torch.ones_like(ids)))


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


def test_too_long_an_input_is_refused_with_the_length():
    model = tiny()
    ids = torch.full((1, 65), 7)
    with pytest.raises(ValueError, match=r"65 tokens is longer than max_positions \(64\)"):
        model(ids, None, IDS[:1])
    with pytest.raises(ValueError, match="longer than max_positions"):
        answers(model, IDS[:1], MASK[:1], max_new_tokens=70, eos_token_id=-1)
