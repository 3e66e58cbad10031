"""Datasets and templates for the tests of preparation."""

from pathlib import Path

import pytest

from metro.data.prompts.templates import TemplateTree
from tests.data.prompts.toys import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tree(testdata) -> TemplateTree:
    """The published templates."""
    return TemplateTree(testdata / "prompts/templates")
