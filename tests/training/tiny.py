"""Training runs small enough for a test, and what is asked of their folders."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from metro.training.output_folder import TRAINER_STATE
from metro.utils.files import read_json

TINY = dict(
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=32,
    encoder_layers=1,
    encoder_attention_heads=2,
    generator_layers=1,
    max_positions=64,
    tokens_per_sample=32,
    sample_break_mode="complete_doc",
    shorten_method="random_crop",
    shorten_data_split_list="train",
    max_tokens=256,
    lr=0.003,
    warmup_updates=2,
    total_num_update=40,
    clip_norm=2.0,
    log_interval=1,
    num_workers=0,
    save_interval_updates=0,
    cpu=True,
    report_to="none",
)


def weights(folder) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model", "pretraining", "adapter_model"):
        if (path := Path(folder) / f"{name}.safetensors").is_file():
            found |= load_file(path)
    return found


def assert_same(one, other, **tolerance) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def losses(folder) -> list[float]:
    history = read_json(Path(folder) / TRAINER_STATE)["log_history"]
    return [line["loss"] for line in history if "grad_norm" in line]
