"""The layers against their formulas, written plainly, and against the original's bucket tables."""

import math

import numpy as np
import pytest
import torch

from metro.modeling.attention_metro_t5 import (
    Attention,
    Visibility,
    attend,
    bias_of_pairs,
    relative_position_buckets,
)
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.layers_metro_t5 import MetroT5Stack, gather_positions


def tiny_config(**changes) -> MetroT5Config:
    sizes = dict(
        vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, max_positions=64
    )
    return MetroT5Config(**{**sizes, "dropout_rate": 0.0, **changes})


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


@pytest.mark.parametrize("bins, max_distance", [(32, 128), (128, 256)])
def test_buckets_equal_the_tables_of_the_original(golden, bins, max_distance):
    recorded = np.load(golden / "relpos_buckets.npz")[f"bins{bins}_max{max_distance}"]
    buckets = relative_position_buckets(bins, max_distance, 512).numpy()
    query, key = np.arange(512)[:, None], np.arange(512)
    assert np.array_equal(buckets[key - query + 511], recorded)


def test_bucket_of_a_distance_does_not_depend_on_the_length():
    long, short = relative_position_buckets(32, 128, 512), relative_position_buckets(32, 128, 5)
    assert torch.equal(long[511 - 4 : 511 + 5], short)


def test_position_bias_and_its_gradient_equal_one_lookup_per_pair():
    attention = randomized(Attention(tiny_config(), has_relative_attention_bias=True))
    table = attention.relative_attention_bias.weight
    length = 40
    buckets = relative_position_buckets(32, 128, length)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    per_pair = table[buckets[distance + length - 1]].permute(2, 0, 1)
    bias = bias_of_pairs(attention.bias_by_distance(length), length)[0]
    assert torch.equal(bias, per_pair)
    weights = torch.randn(bias.shape)
    torch.testing.assert_close(
        torch.autograd.grad((bias * weights).sum(), table)[0],
        torch.autograd.grad((per_pair * weights).sum(), table)[0],
    )


def test_attention_of_two_tokens_by_hand():
    """Two keys with scores ln 3 and 0 (K = 1): weights 3/4 and 1/4."""
    q = torch.tensor([[[[math.log(3.0)]]]])
    k, v = torch.tensor([[[[1.0], [0.0]]]]), torch.tensor([[[[4.0], [8.0]]]])
    out, weights = attend(q, k, v, None, Visibility(), 0.0, return_weights=True)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0]))


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_eager_and_sdpa_agree(is_decoder, padded):
    config = tiny_config()
    stack = randomized(MetroT5Stack(config, is_decoder)).eval()
    inputs = stack_inputs(is_decoder, padded)
    config._attn_implementation = "sdpa"
    sdpa = stack(**inputs).last_hidden_state
    config._attn_implementation = "eager"
    eager = stack(**inputs).last_hidden_state
    valid = slice(None) if inputs["attention_mask"] is None else inputs["attention_mask"].bool()
    torch.testing.assert_close(sdpa[valid], eager[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_last_layer_at_positions_equals_picking_from_all(is_decoder, padded):
    """The oracle computes every position; values and all parameter gradients agree."""
    stack = randomized(MetroT5Stack(tiny_config(), is_decoder))
    inputs = stack_inputs(is_decoder, padded)
    positions = torch.tensor([[0, 3, 4], [5, 1, 2], [2, 0, 1]])
    full = gather_positions(stack(**inputs).last_hidden_state, positions)
    picked = stack(**inputs, positions=positions).last_hidden_state
    torch.testing.assert_close(picked, full, rtol=1e-4, atol=1e-5)
    weights = torch.randn(full.shape)
    parameters = [p for n, p in stack.named_parameters()]
    for got, want in zip(
        torch.autograd.grad((picked * weights).sum(), parameters),
        torch.autograd.grad((full * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_padding_does_not_change_the_tokens(is_decoder):
    """Row 1 of the padded batch equals the same row alone, without padding."""
    stack = randomized(MetroT5Stack(tiny_config(), is_decoder)).eval()
    inputs = stack_inputs(is_decoder, padded=True)
    together = stack(**inputs).last_hidden_state[1, :4]
    alone = {k: None if v is None else v[1:2] for k, v in inputs.items()}
    alone["input_ids"], alone["attention_mask"] = alone["input_ids"][:, :4], None
    torch.testing.assert_close(together, stack(**alone).last_hidden_state[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feed_forward_proj": "tanh"}, "'tanh'"),
        ({"relative_attention_num_buckets": 7}, "7"),
        ({"relative_attention_max_distance": 16}, "16"),
    ],
)
def test_impossible_configurations_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_the_configuration_keeps_its_ids_through_json(tmp_path):
    """Older releases of transformers reset ids that do not go through their constructor."""
    MetroT5Config(decoder_start_token_id=1000).save_pretrained(tmp_path)
    for config in (MetroT5Config(), MetroT5Config.from_pretrained(tmp_path)):
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.decoder_start_token_id == 1000 and config.tie_word_embeddings


def stack_inputs(is_decoder, padded):
    ids = torch.randint(4, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = None
    if padded:
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
        ids = ids.masked_fill(mask == 0, 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if is_decoder:
        generator = torch.Generator().manual_seed(2)
        inputs["encoder_hidden_states"] = torch.randn(3, 5, 16, generator=generator)
    return inputs
