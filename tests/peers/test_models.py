"""The common tests of transformers' models, run on METRO-T5.

T5 is held to the same tests by transformers itself.
"""

import unittest

import pytest
import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5EncoderModel, MetroT5ForConditionalGeneration
from tests.peers.source import peer_module, run_peers

pytestmark = pytest.mark.slow

NOT_APPLICABLE = {
    "test_model_base_model_prefix": "a decoder needs the embedding that it is tied to: as in T5, "
    "there is no model below the one with an output projection",
    "test_load_save_without_tied_weights": "METRO-T5 has one embedding matrix",
}
ENCODER_ONLY = {"test_training": "an encoder alone has no loss"}


class Sizes:
    """What the common tests ask about the model."""

    is_training, is_encoder_decoder = True, False
    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = 3, 7, 2, 16, 4
    encoder_seq_length = decoder_seq_length = key_length = seq_length

    def get_config(self) -> MetroT5Config:
        sizes = dict(vocab_size=99, d_model=16, d_kv=4, d_ff=32, num_heads=4, max_positions=128)
        return MetroT5Config(**sizes, num_layers=2, is_encoder_decoder=self.is_encoder_decoder)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.get_config(), inputs


class SizesOfBoth(Sizes):
    """With inputs of the decoder."""

    is_encoder_decoder = True

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs |= {f"decoder_{name}": tensor.clone() for name, tensor in inputs.items()}
        return config, inputs


@pytest.fixture(scope="module")
def common():
    return peer_module("test_modeling_common")


@pytest.mark.client("tests of transformers", "the common ones of models")
def test_the_whole_model_passes(common):
    """A few belong to features that METRO-T5 does not offer; transformers skips those itself."""

    class WholeModel(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (MetroT5ForConditionalGeneration,)
        is_encoder_decoder = True

        def setUp(self):
            self.model_tester = SizesOfBoth()

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            if return_labels:
                inputs["labels"] = torch.zeros((3, 7), dtype=torch.long)
            return inputs

    run_peers(WholeModel, NOT_APPLICABLE)


def test_the_encoder_passes(common):
    class Encoder(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (MetroT5EncoderModel,)

        def setUp(self):
            self.model_tester = Sizes()

    run_peers(Encoder, NOT_APPLICABLE | ENCODER_ONLY)
