"""The table of names: one name of METRO for each of the original's, and none for a stranger's."""

import pytest

from metro.models.fairseq_names import metro_name, original_name
from tests.pretraining.golden import load_checkpoint


def test_names_by_hand():
    assert metro_name("encoder.layers.3.fc1.bias") == (
        "main.encoder.block.3.layer.1.DenseReluDense.wi.bias"
    )
    assert metro_name("decoder.layers.0.final_layer_norm.weight") == (
        "main.decoder.block.0.layer.2.layer_norm.weight"
    )
    assert metro_name("generator.sentence_encoder.embed_positions.weight") == (
        "auxiliary.encoder.pos_embed.weight"
    )
    assert metro_name("rtd_head.dense.weight") == "rtd_head.dense.weight"
    assert metro_name("decoder.version") is None


@pytest.mark.parametrize("checkpoint", ["metro_tiny_a", "metro_tiny_r", "t5_tiny_c"])
def test_every_parameter_of_a_checkpoint_gets_a_name_of_its_own_and_its_old_one_back(
    golden, checkpoint
):
    state = load_checkpoint(golden, checkpoint)["model"]
    names = {name: metro_name(name) for name in state if metro_name(name) is not None}
    assert len(names) == len(set(names.values())) > 80
    assert all(original_name(new) == old for old, new in names.items())


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layers.0.gate.weight",
        "classifier.weight",
        "encoder.layers.0.encoder_attn.q_proj.bias",
    ],
)
def test_a_parameter_of_another_model_is_refused_by_name(name):
    for translate in (metro_name, original_name):
        with pytest.raises(ValueError, match=name):
            translate(name)
