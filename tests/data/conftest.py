"""A text and a vocabulary trained on it; datasets and templates for the tests of preparation."""

from pathlib import Path

import pytest

from metro.data.text.corpus import prepare_text
from tests.data.prepared import random_text
from tests.data.prompts.toys import make_world


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(0, 3000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocab(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vocab") / "vocab"
    return prepare_text(
        inputs=[text], out=folder, train_vocab=150, num_workers=1, progress=False
    ).folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))
