"""Rank classification against scores recorded from the original implementations.

Oracles: the scores of METRO-T0's evaluation code and of FLIPPED's scoring step (recorded numbers),
and a plain computation that runs the model once per option and takes log_softmax of all logits.
"""

import dataclasses
import json
import random
import re

import pytest
import torch
from transformers.cache_utils import DynamicCache

from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.scoring.pair_scoring import NotFinite, Pair, PairScorer, make_batches
from metro.evaluation.scoring.rank_classification import RankClassifier
from metro.evaluation.settings import EvaluationSettings
from metro.evaluation.tasks.examples import EvaluationExample
from metro.utils.messages import UserError
from tests.evaluation.golden import load_exported, score_alone
from tests.finetuning.conftest import KINDS, small_model
from tests.recorded_models import load_tiny_t5

METHODS = ("flipped", "direct", "channel")


@pytest.fixture(scope="module")
def tiny_t5(golden):
    return load_tiny_t5(golden)


@pytest.fixture(scope="module")
def flipped_golden(golden):
    return json.loads((golden / "flipped/scoring.json").read_text())["examples"]


def golden_pairs(example: dict, method: str) -> list[Pair]:
    sources, targets = example[f"{method}_encoder_ids"], example[f"{method}_target_ids"]
    if method == "direct":
        return [Pair(tuple(sources), tuple(target)) for target in targets]
    return [Pair(tuple(source), tuple(targets)) for source in sources]


@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_those_of_the_original(tiny_t5, flipped_golden, method):
    """Oracle: FLIPPED's scoring step in double precision."""
    pairs = [golden_pairs(example, method) for example in flipped_golden]
    scores = PairScorer(tiny_t5).score([pair for some in pairs for pair in some])
    for example, some in zip(flipped_golden, pairs, strict=True):
        mine, scores = scores[: len(some)], scores[len(some) :]
        assert mine == pytest.approx(example[method]["scores"], abs=1e-4 * len(some[0].target))
        assert mine.index(max(mine)) == example[method]["argmax"]


@pytest.mark.parametrize("name", ["metro_tiny_a", "t5_prompt_tiny_f"])
def test_text_to_prediction_equals_metro_t0(golden, name):
    """Oracle: METRO-T0's evaluation code on 40 examples, from text to prediction."""
    recorded = json.loads((golden / "eval_scoring.json").read_text())
    model, tokenizer = load_exported(golden, name)
    examples = [
        EvaluationExample(i, e["input"], e["choices"], e["choices"].index(e["target"]))
        for i, e in enumerate(recorded["examples"])
    ]
    rankings = RankClassifier(PairScorer(model), PromptEncoder(tokenizer)).rank(examples)
    for ranking, item in zip(rankings, recorded["models"][name]["items"], strict=True):
        assert ranking.scores == pytest.approx(item["choice_logprob_sums"], rel=1e-5, abs=1e-4)
        assert ranking.prediction == item["prediction"]
    right = sum(r.prediction == e.label for r, e in zip(rankings, examples, strict=True))
    assert right / len(examples) == recorded["models"][name]["accuracy"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_tokens", [1, 100, 700, 10**6])
def test_batch_size_and_order_do_not_matter(tiny_t5, flipped_golden, method, batch_tokens):
    """Oracle: each pair alone through the model, all logits."""
    pairs = [pair for example in flipped_golden for pair in golden_pairs(example, method)]
    expected = {pair: score_alone(tiny_t5, pair) for pair in pairs}
    random.Random(batch_tokens).shuffle(pairs)
    scores = PairScorer(tiny_t5, batch_tokens=batch_tokens).score(pairs)
    assert scores == pytest.approx([expected[pair] for pair in pairs], abs=1e-4)


def test_metro_model_scores_shared_sources_like_each_pair_alone(golden):
    """Oracle: each pair alone, all logits; METRO's absolute positions must restart per option."""
    model, _ = load_exported(golden, "t5_prompt_tiny_f")
    draw = random.Random(0)
    ids = lambda low, high: tuple(draw.choices(range(5, 900), k=draw.randint(low, high)))  # noqa: E731
    sources = [(0, *ids(1, 30), 2) for _ in range(5)]
    pairs = [Pair(draw.choice(sources), (*ids(0, 9), 2)) for _ in range(23)]
    scores = PairScorer(model, batch_tokens=400).score(pairs)
    assert scores == pytest.approx([score_alone(model, pair) for pair in pairs], abs=1e-4)


def test_equal_sources_are_encoded_once_and_equal_pairs_scored_once(tiny_t5, monkeypatch):
    """Oracle: counted rows of the encoder: 2 sources with 3 and 1 targets, one pair twice."""
    rows, scorer = [], PairScorer(tiny_t5)
    encoder = tiny_t5.get_encoder()
    forward = encoder.forward
    monkeypatch.setattr(
        encoder,
        "forward",
        lambda *args, **kwargs: rows.append(len(kwargs["input_ids"])) or forward(*args, **kwargs),
    )
    a, b = (10, 11, 1), (12, 13, 14, 1)
    pairs = [Pair(a, (20, 1)), Pair(a, (21, 1)), Pair(b, (20, 1)), Pair(a, (22, 1))]
    first = scorer.score([*pairs, pairs[0]])
    assert sum(rows) == 2
    assert first[0] == first[-1]
    assert scorer.score(pairs[::-1]) == first[:4][::-1]
    assert sum(rows) == 2  # remembered
    assert len(scorer.known) == 4


def test_processes_that_share_the_work_get_the_same_bits(tiny_t5, flipped_golden):
    """Oracle: one process. The processes' shares are added up."""
    pairs = [p for e in flipped_golden for method in METHODS for p in golden_pairs(e, method)]
    alone = PairScorer(tiny_t5, batch_tokens=300).score(pairs)
    shares = []
    for rank in range(3):
        PairScorer(
            tiny_t5,
            batch_tokens=300,
            rank=rank,
            num_processes=3,
            gather=lambda share: shares.append(share) or share,
        ).score(pairs)
    assert all((share != 0).any() for share in shares)
    together = dict(zip(dict.fromkeys(pairs), sum(shares).tolist(), strict=True))
    assert [together[pair] for pair in pairs] == alone


def test_batches_hold_every_pair_once_within_the_budget():
    """Oracle: counting. Padded size = pairs * (longest source + longest target)."""
    draw = random.Random(1)
    pairs = [
        Pair(tuple([draw.randrange(3)] * draw.randint(1, 40)), tuple([5] * draw.randint(1, 20)))
        for _ in range(300)
    ]
    batches = make_batches(pairs, 500)
    seen = [Pair(batch.sources[owner], t) for batch in batches for owner, t in batch.pairs]
    assert sorted(seen) == sorted(set(pairs))
    for batch in batches:
        width = max(map(len, batch.sources)) + max(len(target) for _, target in batch.pairs)
        assert len(batch.pairs) * width <= 500
    assert make_batches(random.Random(2).sample(pairs, 300), 500) == batches


def test_mean_divides_by_target_tokens_and_calibration_subtracts_the_empty_prompt(golden):
    """Oracle: the plain sums, combined by hand."""
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    encoder, scorer = PromptEncoder(tokenizer), PairScorer(model)
    example = EvaluationExample(0, "is it so ?", ["yes", "no , not at all"], 0)
    plain = RankClassifier(scorer, encoder).rank([example])[0].scores
    empty = dataclasses.replace(example, input="")
    without = RankClassifier(scorer, encoder).rank([empty])[0].scores
    lengths = [len(ids) for ids in encoder.targets(example.choices)]
    mean = RankClassifier(scorer, encoder, normalization="mean").rank([example])[0]
    assert mean.scores == [s / n for s, n in zip(plain, lengths, strict=True)]
    calibrated = RankClassifier(scorer, encoder, normalization="calibrated").rank([example])[0]
    assert calibrated.scores == [s - w for s, w in zip(plain, without, strict=True)]


@pytest.mark.parametrize("normalization", ["sum", "calibrated"])
def test_a_cut_option_is_counted_once(golden, normalization):
    """Oracle: by hand; one of two options is longer than 8 tokens."""
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    encoder = PromptEncoder(tokenizer, max_target_length=8)
    example = EvaluationExample(0, "is it so ?", ["yes", "no , " * 9], 0)
    RankClassifier(PairScorer(model), encoder, normalization=normalization).rank([example])
    assert encoder.num_cut_targets == 1


def test_bad_settings_are_refused(tiny_t5):
    """Oracle: the message names the value and what to use."""
    for options, message in (
        ({"method": "sideways"}, "'sideways'; use one of direct, channel, flipped"),
        ({"normalization": "median"}, "'median'; use one of sum, mean, calibrated"),
        ({"method": "channel", "normalization": "calibrated"}, "use sum or mean"),
        ({"limit": 0}, "limit is 0; use 1 or more"),
        ({"label_words": "swapped"}, "'swapped'; use one of words, published, original"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationSettings(models=["a"], **options)
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        PairScorer(tiny_t5, batch_tokens=0)


def test_examples_that_cannot_be_asked_are_refused():
    """Oracle: the message names the choices; of one choice alone every model is right."""
    for choices, label, reason in (
        ([], 0, "no answer choices"),
        (["a", " "], 0, "empty answer choice: ['a', ' ']"),
        (["a", "b"], 2, "label out of range of the answer choices: 2 of ['a', 'b']"),
        (["a", "b"], -1, "label out of range of the answer choices: -1 of ['a', 'b']"),
        (["a", "b"], None, "answer not among the choices"),
        (["a", "a"], 1, "a single answer choice: ['a', 'a']"),
        (["a", "\ud83d"], 0, "text with half a character"),
    ):
        with pytest.raises(UnusableRow, match=re.escape(reason)):
            EvaluationExample(3, "x", choices, label)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.05)])
def test_gpu_scores_like_the_cpu(tiny_t5, flipped_golden, method, dtype, tolerance):
    """Oracle: the CPU in float32; tolerances per token."""
    import copy

    pairs = [pair for example in flipped_golden for pair in golden_pairs(example, method)]
    expected = PairScorer(tiny_t5).score(pairs)
    model = copy.deepcopy(tiny_t5).to("cuda", dtype)
    for pair, score, truth in zip(pairs, PairScorer(model).score(pairs), expected, strict=True):
        assert score == pytest.approx(truth, abs=tolerance * len(pair.target))


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_families_score_like_each_pair_alone(kind):
    """Oracle: each pair alone, all logits. Sources are shared, so that caches are used."""
    model = small_model(kind)
    draw = random.Random(3)
    ids = lambda low, high: tuple(draw.choices(range(4, 40), k=draw.randint(low, high)))  # noqa: E731
    sources = [(*ids(1, 12), 2) for _ in range(3)]
    pairs = [Pair(draw.choice(sources), (*ids(0, 6), 2)) for _ in range(12)]
    scores = PairScorer(model, batch_tokens=150).score(pairs)
    assert scores == pytest.approx([score_alone(model, pair) for pair in pairs], abs=1e-4)


@pytest.mark.parametrize("fault", ["whisper", "no start symbol", "a cache that lies", "nan"])
def test_models_of_another_kind_are_refused_before_work_is_done(fault, monkeypatch):
    """Oracle: the message, of models that read sound, lack a start symbol, or score a text
    otherwise where it is scored beside another one."""
    import transformers

    model, message = small_model("bart"), "has no decoder_start_token_id"
    if fault == "whisper":
        sides = [
            f"{side}_{what}" for side in ("encoder", "decoder") for what in ("layers", "ffn_dim")
        ]
        sizes = dict.fromkeys(sides, 1) | dict(d_model=8, decoder_start_token_id=3)
        sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2)
        model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))
        message = "WhisperForConditionalGeneration cannot be used here, .* missing 1 required"
    elif fault == "no start symbol":
        for settings in (model.config, model.generation_config):
            settings.decoder_start_token_id = None
    elif fault == "a cache that lies":
        real = DynamicCache.update
        monkeypatch.setattr(
            DynamicCache, "update", lambda self, k, v, *a, **o: real(self, -k, v, *a, **o)
        )
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_()
        message = "its cache of past tokens changes its numbers"
    else:
        model.model.shared.weight.data[7] = float("nan")
        with pytest.raises(NotFinite, match="log-probability of a text is nan"):
            PairScorer(model).score([Pair((7, 2), (8, 2))])
        return
    with pytest.raises(UserError, match=message) as refused:
        PairScorer(model)
    assert "\n" not in str(refused.value)


def test_a_model_without_padding_token_scores_the_same():
    """Oracle: the same weights with one: what fills up a batch is never seen."""
    pairs = [Pair(tuple(range(3, 3 + n)), (*range(5, 5 + m), 2)) for n in (1, 4, 9) for m in (1, 5)]
    model = small_model("t5")
    expected = PairScorer(model).score(pairs)
    model.config.pad_token_id = None
    assert PairScorer(model).score(pairs) == pytest.approx(expected, abs=1e-5)
