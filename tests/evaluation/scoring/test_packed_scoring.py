"""METRO models on the CPU without padding, their options as trees.

Oracle: each pair alone through the model, all logits; trees, runs and batches against what one
counts by hand.
"""

import concurrent.futures
import random
import types

import pytest
import torch

from metro.evaluation.scoring import packed_attention, packed_scoring
from metro.evaluation.scoring.packed_attention import Packed, Unprojected
from metro.evaluation.scoring.packed_scoring import can_pack, decode_packed, grow_trees, make_paths
from metro.evaluation.scoring.pair_batches import Batch, Pair, make_packed_batches
from metro.evaluation.scoring.pair_scoring import PairScorer
from metro.evaluation.scoring.target_projection import target_log_probabilities
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from tests.evaluation.golden import score_alone

END = 2


def make_model(**settings) -> MetroT5ForConditionalGeneration:
    """A small model with everything random, the relative position bias too."""
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=60)
    model = MetroT5ForConditionalGeneration(
        MetroT5Config(**sizes, max_positions=40, initializer_factor=3, **settings)
    )
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def draw_pairs(count: int) -> list[Pair]:
    """Few lengths, so that there are runs of equal ones; a small alphabet, so that options share
    beginnings.
    """
    draw = random.Random(0)
    sources = [tuple(draw.choices(range(4, 50), k=draw.choice([3, 3, 9, 17]))) for _ in range(12)]
    return [
        Pair(draw.choice(sources), (*draw.choices([7, 8], k=draw.choice([0, 1, 1, 2, 5])), END))
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
@pytest.mark.parametrize("path_step", [1, 3, 16])
@pytest.mark.parametrize("way", [Packed, Unprojected])
def test_scores_are_those_of_each_pair_alone(monkeypatch, batch_tokens, path_step, way):
    """Oracle: one pair at a time, through the model's own forward pass."""
    monkeypatch.setattr(packed_scoring, "PATH_STEP", path_step)
    monkeypatch.setattr(packed_scoring, "see_sources", lambda model, parts, _: way(parts))
    model = make_model()
    assert can_pack(model)
    pairs = draw_pairs(70)
    scores = PairScorer(model, batch_tokens=batch_tokens).score(pairs)
    assert scores == pytest.approx([score_alone(model, pair) for pair in pairs], abs=2e-5)


def test_half_precision_is_packed_too():
    """Oracle: float32; bfloat16 keeps 8 bits."""
    pairs = draw_pairs(20)
    exact = PairScorer(make_model()).score(pairs)
    rounded = PairScorer(make_model().bfloat16()).score(pairs)
    for pair, score, truth in zip(pairs, rounded, exact, strict=True):
        assert score == pytest.approx(truth, abs=0.03 * len(pair.target))


def test_models_with_eager_attention_are_left_to_the_padded_way():
    """Oracle: the same scores, and no packing where attention has to be the plain one."""
    eager = MetroT5ForConditionalGeneration._from_config(
        make_model().config, attn_implementation="eager"
    ).eval()
    eager.load_state_dict(make_model().state_dict())
    assert not can_pack(eager)
    pairs = draw_pairs(30)
    expected = PairScorer(make_model()).score(pairs)
    assert PairScorer(eager).score(pairs) == pytest.approx(expected, abs=2e-5)


def test_a_tree_holds_common_beginnings_once():
    """Oracle: by hand. Start 0; options 5 6 7, 5 6 8, 9, 5 with the end symbol.

    Places: 0 start, 1 five, 2 six, 3 seven, 4 eight, 5 nine.
    """
    options = (5, 6, 7, END), (5, 6, 8, END), (9, END), (5, END)
    batch = Batch([(1, 1)], [(0, option) for option in options])
    (tree,) = grow_trees(batch, start=0)
    assert tree.ids == [0, 5, 6, 7, 8, 9]
    assert tree.depths == [0, 1, 2, 3, 3, 1]
    assert tree.asked == [
        (0, 5, 0), (1, 6, 0), (2, 7, 0), (3, END, 0),
        (0, 5, 1), (1, 6, 1), (2, 8, 1), (4, END, 1),
        (0, 9, 2), (5, END, 2),
        (0, 5, 3), (1, END, 3),
    ]  # fmt: skip
    assert tree.paths() == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 5]]
    (alone,) = grow_trees(Batch([()], [(0, (END,))]), start=0)
    assert alone.paths() == [[0]]


def test_paths_of_similar_length_are_computed_together(monkeypatch):
    """Oracle: by hand. Places 0 to 4 are start 5 6 7 9 of the first tree, 5 and 6 start 5."""
    monkeypatch.setattr(packed_scoring, "PATH_STEP", 2)
    pairs = [(0, (5, 6, 7, END)), (0, (9, END)), (1, (5, END))]
    paths = make_paths(grow_trees(Batch([(), ()], pairs), start=0))
    assert [tokens.tolist() for tokens in paths.tokens] == [[[0, 4], [5, 6]], [[0, 1, 2, 3]]]
    at = torch.cat([tokens.flatten() for tokens in paths.tokens])[paths.place_N]
    assert at.tolist() == [0, 1, 2, 3, 4, 5, 6]

    monkeypatch.setattr(packed_scoring, "PATH_STEP", 8)
    paths = make_paths(grow_trees(Batch([(), ()], pairs), start=0))
    (tokens,) = paths.tokens
    assert tokens.tolist() == [[0, 4, 0, 0], [5, 6, 5, 5], [0, 1, 2, 3]]
    assert tokens.flatten()[paths.place_N].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_batches_hold_every_pair_once_within_the_budget():
    """Oracle: counting tokens; a source counts once in a batch."""
    pairs = draw_pairs(200)
    batches = make_packed_batches(pairs, 50)
    seen = [Pair(batch.sources[owner], t) for batch in batches for owner, t in batch.pairs]
    assert sorted(seen) == sorted(set(pairs))
    for batch in batches:
        assert len(set(batch.sources)) == len(batch.sources)
        size = sum(map(len, batch.sources)) + sum(len(target) for _, target in batch.pairs)
        assert size <= 50
    assert make_packed_batches(random.Random(2).sample(pairs, 200), 50) == batches
    assert all(len(batch.pairs) == 1 for batch in make_packed_batches(pairs, 1))


def test_the_encoder_reads_each_source_once_and_nothing_else(monkeypatch):
    """Oracle: counted tokens of the encoder and of the decoder."""
    counts = []
    run_stack = packed_scoring.run_stack
    monkeypatch.setattr(
        packed_scoring,
        "run_stack",
        lambda stack, ids, *rest: counts.append(len(ids)) or run_stack(stack, ids, *rest),
    )
    a, b = (10, 11, 12), (13, 14)
    pairs = [Pair(a, (7, 8, END)), Pair(a, (7, 9, END)), Pair(b, (7, END))]
    PairScorer(make_model()).score(pairs)
    assert counts == [len(a) + len(b), 4 + 2]  # start 7 8 9; start 7


def test_the_model_is_left_as_it_was_also_after_an_error():
    """Oracle: the attributes of all modules before. A source of 41 tokens has no position."""
    model = make_model()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=r"a sequence of 41 tokens .* max_positions \(40\)"):
        decode_packed(model, Batch([(5,) * 41], [(0, (7, END))]))
    decode_packed(model, Batch([(5,) * 40], [(0, (7, END))]))
    after = [dict(vars(module)) for module in model.modules()]
    assert [set(x) for x in after] == [set(x) for x in before]
    assert all(a.get("attend") is b.get("attend") for a, b in zip(after, before, strict=True))


def test_the_model_is_left_as_it_was_when_interrupted_while_it_is_prepared(monkeypatch):
    """Oracle: the attributes of all modules before. The fifth is interrupted."""
    calls = []

    def interrupt(function, module):
        calls.append(module)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return types.MethodType(function, module)

    monkeypatch.setattr(packed_attention, "MethodType", interrupt)
    model = make_model()
    before = [dict(vars(module)) for module in model.modules()]
    batch = Batch([(5, END)], [(0, (7, END))])
    with pytest.raises(KeyboardInterrupt):
        decode_packed(model, batch)
    assert [dict(vars(module)) for module in model.modules()] == before
    decode_packed(model, batch)  # nor is it held any more


def test_threads_may_score_one_model():
    """Oracle: the same pairs in one thread; the model's attributes before."""
    model, pairs = make_model(), draw_pairs(120)
    before = [dict(vars(module)) for module in model.modules()]
    expected = PairScorer(model, batch_tokens=30).score(pairs)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        scorers = [PairScorer(model, batch_tokens=30) for _ in range(4)]
        found = list(pool.map(lambda scorer: scorer.score(pairs), scorers))
    assert found == [expected] * 4
    assert [dict(vars(module)) for module in model.modules()] == before


def test_an_output_embedding_of_another_type_is_converted():
    """Oracle: the same values in the model's type throughout."""
    model, pairs = make_model().bfloat16(), draw_pairs(20)
    expected = PairScorer(model).score(pairs)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().float())
    assert PairScorer(model).score(pairs) == expected


@pytest.mark.parametrize("with_bias", [False, True])
def test_log_probabilities_in_blocks_of_words_are_those_of_all_words(with_bias):
    """Oracle: log_softmax of all logits in float64. Blocks are of 1,024 words."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4200, 6), torch.randn(1300, 6)
    bias = torch.randn(1300) if with_bias else None
    row = torch.randint(4200, (3000,))
    target = torch.cat([torch.tensor([0, 511, 512, 1023, 1024, 1299]), torch.arange(2994) % 1300])
    logits = torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )
    torch.testing.assert_close(
        target_log_probabilities(hidden, row, target, weight, bias).double(),
        logits.log_softmax(-1)[row, target],
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_certain_tokens_stay_certain_in_half_precision(dtype):
    """Oracle: log_softmax of all logits. Logits of 60 are 0.25 apart in bfloat16; the others' are
    24 less, so that every log-probability is 0 but for what rounding adds.
    """
    torch.manual_seed(0)
    weight = torch.randn(1300, 128).to(dtype)
    target = torch.randint(1300, (4200,))
    hidden = (weight[target].float() * 0.5).to(dtype)
    expected = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    row = torch.arange(4200)
    found = target_log_probabilities(hidden, row, target, weight)
    torch.testing.assert_close(found, expected[row, target], rtol=0, atol=1e-2)
    torch.testing.assert_close(found, torch.zeros(4200), rtol=0, atol=1e-2)


@pytest.mark.parametrize("token", [-1, 60])
def test_targets_that_the_model_does_not_know_are_refused(token):
    """Oracle: by hand; the last token of a target is read by no embedding."""
    with pytest.raises(ValueError, match=rf"{token}.* but the model knows 0 to 59"):
        PairScorer(make_model()).score([Pair((5, END), (7, token))])
