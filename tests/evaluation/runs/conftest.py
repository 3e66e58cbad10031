"""A run that nothing disturbed, with its suite and model."""

import pytest

from tests.evaluation.golden import load_exported
from tests.evaluation.toy import run, write_suite


@pytest.fixture(scope="module")
def loaded(golden):
    return load_exported(golden, "t5_prompt_tiny_f")


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, suite_file, loaded):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, suite_file, *loaded)
    return folder
