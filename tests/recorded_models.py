"""The models behind the recorded numbers, built with torch and their class alone."""

import json

import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from tests.golden_files import Golden, unpack_tensors


def load_released(golden: Golden, name: str) -> MetroT5ForConditionalGeneration:
    """A folder in the layout of the released METRO-T0 models, in float32."""
    folder = golden / f"hf_export/{name}"
    fields = json.loads((folder / "config.json").read_text())
    for field in ("model_type", "architectures", "torch_dtype", "transformers_version"):
        del fields[field]
    model = MetroT5ForConditionalGeneration(MetroT5Config(**fields))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def load_tiny_t5(golden: Golden) -> torch.nn.Module:
    """The random T5 v1.1 that the FLIPPED numbers were computed with."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = json.loads((golden / "flipped/tiny_t5_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("notes", "architectures")}
    model = T5ForConditionalGeneration(T5Config(**settings))
    # transformers 5 ties the embeddings of a new T5 whatever the configuration says
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    keys = model.load_state_dict(unpack_tensors(golden / "flipped/tiny_t5.json"), strict=False)
    assert not keys.unexpected_keys
    assert all("embed_tokens" in name for name in keys.missing_keys)
    return model.eval()
