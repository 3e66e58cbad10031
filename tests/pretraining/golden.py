"""The original's numbers and models, shared by the parity tests."""

import json
from dataclasses import dataclass

import numpy as np
import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.models.fairseq_names import metro_name, rename_fairseq_state
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.losses import MetroLosses, MetroObjective
from metro.pretraining.model import MetroPretrainingModel
from tests.golden_files import Golden

CHECKPOINT = {"a": "metro_tiny_a", "b": "metro_tiny_b", "r": "metro_tiny_r", "c": "t5_tiny_c"}
CHECKPOINT["s"] = "metro_tiny_r"

PUBLISHED_NAMES = {
    "loss": "total",
    "generator_loss": "mlm_loss",
    "discriminator_loss": "corrective_lm_loss",
    "discriminator_nll_loss": "corrective_lm_nll",
    "rtd_loss": "rtd_loss",
    "ntokens": "num_tokens",
    "sample_size": "sample_size",
    "generator_sample_size": "num_masked",
    "rtd_sample_size": "num_rtd",
    "generator_n_correct": "mlm_num_correct",
    "replaced_n_correct": "replaced_num_correct",
    "replaced_total": "num_replaced",
    "unreplaced_n_correct": "unreplaced_num_correct",
    "unreplaced_total": "num_unreplaced",
    "rtd_replaced_n_correct": "rtd_replaced_num_correct",
    "rtd_unreplaced_n_correct": "rtd_unreplaced_num_correct",
}
"""Names in the original's logging output, and fields of ``MetroLosses``."""


@dataclass
class GoldenBatch:
    """One recorded batch: arrays, numbers and the model at the recorded weights."""

    arrays: dict[str, torch.Tensor]
    numbers: dict
    model: torch.nn.Module


def load_checkpoint(golden: Golden, name: str) -> dict:
    return torch.load(golden / f"checkpoints/{name}.pt", weights_only=True)


def tiny_config() -> MetroT5Config:
    sizes = dict(vocab_size=1128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return MetroT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=1000)


def load_model(golden: Golden, letter: str, checkpoint: dict | None = None) -> torch.nn.Module:
    """METRO (a, b, r) or plain T5 (c, s) with the weights of the original's checkpoint."""
    checkpoint = checkpoint or load_checkpoint(golden, CHECKPOINT[letter])
    state = rename_fairseq_state(checkpoint["model"])
    if letter in "cs":
        model = MetroT5ForConditionalGeneration(tiny_config())
        state = {k.removeprefix("main."): v for k, v in state.items() if k.startswith("main.")}
    else:
        options = checkpoint["cfg"]["model"]
        model = MetroPretrainingModel(
            tiny_config(),
            MetroPretrainingConfig(
                auxiliary_layers=options["generator_layers"],
                rtd_head=options["rtd_head"],
                share=options["share_generator_discriminator_embed"],
            ),
        )
    model.load_state_dict(state)
    return model


def load_batch(golden: Golden, letter: str) -> GoldenBatch:
    arrays = np.load(golden / f"forward_{letter}.npz")
    numbers = json.loads((golden / f"forward_{letter}.json").read_text())
    tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return GoldenBatch(tensors, numbers, load_model(golden, letter).eval())


def objective(settings: dict) -> MetroObjective:
    """The criterion's published settings as an objective."""
    return MetroObjective(
        corrective_lm_weight=settings["discriminator_loss_weight"],
        rtd_weight=settings["rtd_loss_weight"],
        positions=settings["masked_positions_only"],
        label_smoothing=settings["label_smoothing"],
        weighted_lm=settings["weighted_lm_loss"],
        divide_by_mean_weight=settings["divide_by_mean_weight"],
        rtd_only=settings["rtd_only"],
    )


def metro_forward(model, batch: dict[str, torch.Tensor], settings: dict) -> MetroLosses:
    """One step on a recorded batch, with the tokens that the original sampled."""
    batch = {name: value.long() for name, value in batch.items()}
    return model(
        masked_ids=batch["src_tokens"],
        original_ids=batch["discriminator_target"],
        is_masked=batch["generator_target"].ne(1),
        decoder_input_ids=batch["prev_output_tokens"],
        sampling_seed=torch.zeros(len(batch["src_tokens"]), dtype=torch.long),
        objective=objective(settings),
        corrupted_ids=batch["replaced_input"],
    )


def parameter(model: torch.nn.Module, fairseq_name: str) -> torch.nn.Parameter | None:
    """The parameter that the original calls ``fairseq_name``; ``None`` for its aliases."""
    name = metro_name(fairseq_name)
    if name is None:
        return None
    prefix = "" if isinstance(model, MetroPretrainingModel) else "main."
    return model.get_parameter(name.removeprefix(prefix))
