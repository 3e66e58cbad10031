"""Kernels are what these tests are for: they are chosen wherever they can run."""

import pytest


@pytest.fixture(autouse=True)
def all_kernels(monkeypatch):
    monkeypatch.setenv("METRO_TRITON", "1")
