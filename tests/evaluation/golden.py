"""Models behind the recorded scores, as the evaluation loads them."""

from pathlib import Path

import torch

import metro


def load_exported(testdata: Path, name: str):
    """Model and tokenizer of a folder in the released layout."""
    return metro.load(testdata / "golden" / "hf_export" / name, dtype=torch.float32)
