"""Models behind the recorded scores, as the evaluation loads them."""

import torch

import metro
from tests.golden_files import Golden


def load_exported(golden: Golden, name: str):
    """Model and tokenizer of a folder in the released layout."""
    return metro.load(golden / f"hf_export/{name}", dtype=torch.float32)
