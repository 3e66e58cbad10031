"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Recorded numbers, vocabularies and texts, which are not part of the project.

    The folder is ``METRO_TESTDATA``, by default ``../shared`` beside the repository.
    """
    folder = Path(os.environ.get("METRO_TESTDATA", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set METRO_TESTDATA to the folder that has them")
    return folder


CHECKPOINTS = ("metro_tiny_a", "metro_tiny_b", "t5_prompt_tiny_f", "t5_tiny_c")


@pytest.fixture(scope="session")
def exported(testdata, tmp_path_factory):
    """``exported(name)``: the folder made of a recorded checkpoint, auxiliary model kept."""
    from metro.conversion.fairseq_to_hf import to_hf

    folder = tmp_path_factory.mktemp("exported")

    def export(name: str) -> Path:
        out = folder / name
        if not out.exists():
            checkpoint = testdata / "golden/checkpoints" / f"{name}.pt"
            to_hf(checkpoint, out, vocab=testdata / "golden/tiny_vocab", keep_auxiliary=True)
        return out

    return export
