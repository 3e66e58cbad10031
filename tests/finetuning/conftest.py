"""Small models of several kinds, and the settings of short runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metro.finetuning.settings import FinetuningSettings
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from tests.finetuning.prepared import write_prepared
from tests.recorded_models import load_tiny_t5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data", 120)


@pytest.fixture
def settings(t5_folder, folder, tmp_path):
    def make(name: str = "out", **options) -> FinetuningSettings:
        common = dict(model=str(t5_folder), data=str(folder), output_dir=str(tmp_path / name))
        common |= dict(batch_size=16, max_steps=12, learning_rate=1e-2, logging_steps=4)
        common |= dict(save_steps=0, use_cpu=True, report_to="none")
        return FinetuningSettings(**{**common, **options})

    return make


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same(one, other, **tolerance) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0, "atol": 0}))


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
