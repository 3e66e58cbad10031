"""Models behind the recorded scores, and scores computed in the plainest way."""

import torch

import metro
from tests.golden_files import Golden


def load_exported(golden: Golden, name: str):
    """Model and tokenizer of a folder in the released layout."""
    return metro.load(golden / f"hf_export/{name}", dtype=torch.float32)


def score_alone(model, pair) -> float:
    """Log-probability of a target given its source: alone, all logits, float64."""
    source, target = pair
    start = model.config.decoder_start_token_id
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([source]),
            decoder_input_ids=torch.tensor([[start, *target[:-1]]]),
        ).logits[0]
    return logits.double().log_softmax(-1)[range(len(target)), target].sum().item()
