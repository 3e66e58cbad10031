"""What tokens of a packed sequence see. Oracle: each attention written out, and counts by hand."""

import pytest
import torch
import torch.nn.functional as F

from metro.evaluation.scoring.packed_attention import (
    Packed,
    Parts,
    Paths,
    Unprojected,
    attend_packed,
    equal_parts,
    see_sources,
)
from metro.modeling.attention_metro_t5 import Attention, bias_of_pairs
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration

SIZES = dict(d_model=12, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)


def test_neighbours_of_equal_size_are_computed_together():
    """Oracle: by hand. Trees of 2, 5, 2, 2 and 3 tokens read sources of 4, 4, 4, 4 and 3."""
    parts = equal_parts([2, 5, 2, 2, 3], [4, 4, 4, 4, 3])
    assert parts == [
        (1, slice(0, 2), slice(0, 4)),
        (1, slice(2, 7), slice(4, 8)),
        (2, slice(7, 11), slice(8, 16)),
        (1, slice(11, 14), slice(16, 19)),
    ]


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("along_paths", [False, True])
def test_attention_keeps_bfloat16_only_where_the_cpu_multiplies_it(
    monkeypatch, has_amx, along_paths
):
    """Oracle: PyTorch's attention in float32, rounded once."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    exact, types_seen = F.scaled_dot_product_attention, set()

    def attention(*inputs, **options):
        types_seen.update(x.dtype for x in inputs if x is not None)
        return exact(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 8).bfloat16().unbind()
    if along_paths:
        seen, bias = Paths([torch.arange(20)[None]], torch.arange(20)), None
        given = {"is_causal": True}
    else:
        seen, bias = Packed([Parts(1, slice(0, 20), slice(0, 20))]), torch.randn(2, 39)
        given = {"attn_mask": bias_of_pairs(bias.bfloat16().float(), 20)}
    out, _ = attend_packed(q, k, v, bias, seen)
    assert types_seen == {torch.bfloat16 if has_amx else torch.float32}
    assert out.dtype == torch.bfloat16
    types_seen.clear()
    attend_packed(q.double(), k.double(), v.double(), bias, seen)
    assert types_seen == {torch.float64}
    expected = exact(q.float(), k.float(), v.float(), **given)
    assert has_amx or torch.equal(out, expected.bfloat16())
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


def test_unprojected_states_are_read_as_keys_and_values_are():
    """Oracle: the model's own attention of each part, in float64."""
    torch.manual_seed(0)
    attention = Attention(MetroT5Config(**SIZES)).double().eval()
    hidden, states = torch.randn(1, 9, 12).double(), torch.randn(1, 15, 12).double()
    parts = equal_parts([2, 2, 5], [4, 4, 7])
    out = attention.o(Unprojected(parts).attend(attention, hidden, states).unsqueeze(0))
    expected = [
        attention(hidden[:, q], states[:, k])[0]
        for q, k in (
            (slice(0, 2), slice(0, 4)),
            (slice(2, 4), slice(4, 8)),
            (slice(4, 9), slice(8, 15)),
        )
    ]
    torch.testing.assert_close(out, torch.cat(expected, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "num_queries, way", [(1, Unprojected), (19, Unprojected), (20, Packed), (100, Packed)]
)
def test_sources_are_read_in_the_way_of_fewer_multiplications(num_queries, way):
    """Oracle: by hand. D = 12, H = 2, K = 8. With keys and values of 100 states projected T queries
    take 100 * 16 * 12 + T * 100 * 16, without T * 16 * 12 + T * 100 * 2 * 12.
    """
    model = MetroT5ForConditionalGeneration(MetroT5Config(**SIZES))
    assert isinstance(
        see_sources(model, equal_parts([num_queries], [100]), torch.zeros(1, 100, 12)), way
    )


@pytest.mark.parametrize(
    "dtype, has_amx, way",
    [
        (torch.float32, True, Unprojected),
        (torch.bfloat16, False, Unprojected),
        (torch.bfloat16, True, Packed),
        (torch.float16, False, Packed),
    ],
)
def test_scores_of_half_precision_are_those_of_keys(monkeypatch, dtype, has_amx, way):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    model = MetroT5ForConditionalGeneration(MetroT5Config(**SIZES)).to(dtype)
    states = torch.zeros(1, 100, 12, dtype=dtype)
    assert isinstance(see_sources(model, equal_parts([1], [100]), states), way)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(see_sources(model, equal_parts([1], [100]), states), Packed)


def test_what_stands_in_the_place_of_a_layer_is_computed_by_itself():
    class Adapted(torch.nn.Linear):
        """Computes something else than its weight says."""

    model = MetroT5ForConditionalGeneration(MetroT5Config(**SIZES))
    model.decoder.block[0].layer[1].EncDecAttention.v = Adapted(12, 16)
    assert isinstance(see_sources(model, equal_parts([1], [100]), torch.zeros(1, 100, 12)), Packed)
