"""Small models of several kinds."""

import pytest
import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from tests.recorded_models import load_tiny_t5


@pytest.fixture
def tiny_t5(golden):
    """The random T5 v1.1 that the FLIPPED numbers were computed with."""
    return load_tiny_t5(golden)


def small_model(kind: str) -> torch.nn.Module:
    """A randomly initialised model of one of the families, d_model 16, 40 words."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(d_model=16, vocab_size=40, pad_token_id=1, decoder_start_token_id=2)
    bart = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    t5 = dict(d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    if kind == "metro":
        return MetroT5ForConditionalGeneration(MetroT5Config(**sizes, **t5)).eval()
    if kind == "t5":  # tied: the decoder's output is scaled
        config = transformers.T5Config(**sizes, **t5)
        return transformers.T5ForConditionalGeneration(config).eval()
    if kind == "t5 untied":
        config = transformers.T5Config(**sizes, **t5, tie_word_embeddings=False)
        model = transformers.T5ForConditionalGeneration(config).eval()
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        return model
    if kind == "bart":
        config = transformers.BartConfig(**sizes, **bart, max_position_embeddings=64)
        model = transformers.BartForConditionalGeneration(config).eval()
        model.final_logits_bias.copy_(torch.randn(1, 40))
        return model
    if kind == "m2m":
        config = transformers.M2M100Config(**sizes, **bart, max_position_embeddings=64)
        return transformers.M2M100ForConditionalGeneration(config).eval()
    if kind == "switch":  # experts that drop tokens; the encoder's output is more than a tensor
        experts = dict(num_experts=3, expert_capacity=2)
        experts |= dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
        config = transformers.SwitchTransformersConfig(**{**sizes, **t5, **experts})
        return transformers.SwitchTransformersForConditionalGeneration(config).eval()
    raise AssertionError(kind)


KINDS = ["metro", "t5", "t5 untied", "bart", "m2m", "switch"]
