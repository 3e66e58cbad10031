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
