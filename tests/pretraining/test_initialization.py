"""Fresh weights are distributed as those of the original (``golden/init_statistics.json``)."""

import json

import pytest
import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.model import MetroPretrainingModel
from tests.pretraining.golden import parameter

MODELS = {
    "metro_base_rtd_simple_share_token": MetroPretrainingConfig(
        4, rtd_head="simple", share="token"
    ),
    "metro_base_rtd_roberta_share_token_pos_norm": MetroPretrainingConfig(
        rtd_head="roberta", share="token_pos_norm"
    ),
    "t5_base": None,
}


def kurtosis_excess(x):
    squares = (x - x.mean()).square()
    return float(squares.square().mean() / squares.mean() ** 2 - 3)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_and_distributions_equal_the_original(golden, name):
    recorded = json.loads((golden / "init_statistics.json").read_text())[name]
    config = MetroT5Config(vocab_size=32768 + 512)
    torch.manual_seed(0)
    if MODELS[name] is None:
        model = MetroT5ForConditionalGeneration(config)
    else:
        model = MetroPretrainingModel(config, MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == recorded["n_params"]
    for fairseq_name, want in recorded["params"].items():
        weight = parameter(model, fairseq_name)
        if weight is None:
            continue
        weight = weight.detach().double()
        assert list(weight.shape) == want["shape"], fairseq_name
        error = 6 * max(want["std"], 1e-12) / weight.numel() ** 0.5  # six standard errors
        assert abs(float(weight.mean()) - want["mean"]) <= 2 * error, fairseq_name
        assert abs(float(weight.std(correction=0)) - want["std"]) <= 2 * error, fairseq_name
        if want["kurtosis_excess"] is not None and weight.numel() > 10_000:
            assert abs(kurtosis_excess(weight) - want["kurtosis_excess"]) < 0.2, fairseq_name
    encoder = (model if MODELS[name] is None else model.main).encoder
    pad = config.pad_token_id
    assert (
        float(encoder.pos_embed.weight[pad].detach().norm())
        == recorded["embed_positions_pad_row_norm"]
    )
    assert float(encoder.embed_tokens.weight[pad].detach().norm()) == pytest.approx(
        recorded["embed_tokens_pad_row_norm"], rel=0.2
    )
