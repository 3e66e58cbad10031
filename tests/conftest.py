"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.golden_files import Golden

ROOT = Path(__file__).resolve().parent.parent


def need_fairseq() -> None:
    """Skip where fairseq is not installed."""
    pytest.importorskip("fairseq", reason="fairseq is not installed (make install)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fairseq"):
        need_fairseq()


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Published vocabularies, templates and datasets, which are not part of the project.

    The folder is ``METRO_TESTDATA``, by default ``../shared`` beside the repository.
    """
    folder = Path(os.environ.get("METRO_TESTDATA", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set METRO_TESTDATA to the folder that has them")
    return folder


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Golden:
    """``golden / "masking.json"``: the path of a recorded file."""
    from tests.golden_files import Golden, unpack

    folder = tmp_path_factory.mktemp("golden")
    unpack(folder)
    return Golden(folder)


@pytest.fixture(scope="session")
def original(testdata) -> Path:
    """The whole recording, with what ``tests/golden`` lacks or holds rounded to float16."""
    return testdata / "golden"


@pytest.fixture(scope="session")
def recorded_text(golden, tmp_path_factory) -> Path:
    """Binarised text of the kind that the recorded models were trained on, as pretraining data."""
    from metro.data.text.corpus import prepare_text

    passages = json.loads((golden / "prompt_T0-bin/raw_examples.json").read_text())
    folder = tmp_path_factory.mktemp("recorded_text")
    text = "\n".join(prompt for examples in passages.values() for prompt, _ in examples)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return prepare_text(
        inputs=[folder / "text.txt"],
        out=folder / "data",
        vocab=golden / "tiny_vocab",
        valid_fraction=0,
        num_workers=1,
        progress=False,
    ).folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Invented text."""
    from tests.data.prepared import random_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(0, 3000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocab(text, tmp_path_factory) -> Path:
    """A vocabulary trained on it."""
    from metro.data.text.corpus import prepare_text

    folder = tmp_path_factory.mktemp("vocab") / "vocab"
    return prepare_text(
        inputs=[text], out=folder, train_vocab=150, num_workers=1, progress=False
    ).folder


CHECKPOINTS = ("metro_tiny_a", "metro_tiny_r", "t5_prompt_tiny_f", "t5_tiny_c")
"""Checkpoints in ``tests/golden``."""

RECORDED = ("metro_tiny_a", "metro_tiny_b", "t5_prompt_tiny_f", "t5_tiny_c")
"""Models with exported folders; ``metro_tiny_b`` is in the whole recording alone."""


@pytest.fixture(scope="session")
def exported(golden, tmp_path_factory):
    """``exported(name)``: the folder made of a recorded checkpoint, auxiliary model kept."""
    from metro.conversion.fairseq_to_hf import to_hf

    folder = tmp_path_factory.mktemp("exported")

    def export(name: str) -> Path:
        out = folder / name
        if not out.exists():
            checkpoint = golden / f"checkpoints/{name}.pt"
            to_hf(checkpoint, out, vocab=golden / "tiny_vocab", keep_auxiliary=True)
        return out

    return export


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Prompts as ``metro prepare-prompts`` prepares them, 60 rows of each of two datasets."""
    from tests.finetuning.prepared import write_prepared

    return write_prepared(tmp_path_factory.mktemp("prepared") / "data", 60)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A random T5 of d_model 32 with a tokenizer of its own, as a Hugging Face folder."""
    from tests.finetuning.prepared import write_t5

    return write_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def pretraining_data(tmp_path_factory) -> Path:
    """A folder of `metro prepare-text`: an epoch of about 17 batches of 256 tokens."""
    from metro.data.text.corpus import prepare_text
    from tests.data.prepared import random_text

    folder = tmp_path_factory.mktemp("pretraining")
    (folder / "text.txt").write_text(random_text(1, 120), encoding="utf-8")
    return prepare_text(
        inputs=[folder / "text.txt"],
        out=folder / "data",
        train_vocab=150,
        valid_fraction=0.1,
        num_workers=1,
        progress=False,
    ).folder


@pytest.fixture
def pretrain(pretraining_data, tmp_path):
    """`pretrain(name, **options)`: a tiny run into that folder."""
    from metro.training.pretrain import pretrain as run
    from tests.training.tiny import TINY

    def pretrain_tiny(name: str = "out", **options):
        paths = {"data": str(pretraining_data), "output_dir": str(tmp_path / name)}
        return run(progress=False, **{**TINY, **paths, **options})

    return pretrain_tiny
