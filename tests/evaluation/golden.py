"""Models behind the recorded scores."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

import metro


def load_exported(testdata: Path, name: str):
    """Model and tokenizer of a folder in the released layout."""
    return metro.load(testdata / "golden" / "hf_export" / name, dtype=torch.float32)


def load_tiny_t5(testdata: Path, dtype=torch.float32):
    folder = testdata / "golden" / "flipped"
    settings = json.loads((folder / "tiny_t5_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("notes", "architectures")}
    model = T5ForConditionalGeneration(T5Config(**settings))
    # transformers 5 ties the embeddings of a new T5 whatever the configuration says
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    keys = model.load_state_dict(load_file(folder / "tiny_t5.safetensors"), strict=False)
    assert not keys.unexpected_keys
    assert all("embed_tokens" in name for name in keys.missing_keys)
    return model.to(dtype).eval()
