"""Processes of their own."""

import os
from collections.abc import Iterator

import pytest

from benchmarks.common import measure_each, measure_isolated


def one_and_then_none() -> Iterator[int]:
    yield 1
    os._exit(3)


def without_end() -> Iterator[int]:
    while True:
        yield os.getpid()


def test_what_a_process_yielded_is_known_before_it_dies():
    values = measure_each(one_and_then_none)
    assert next(values).value == 1
    with pytest.raises(RuntimeError, match="one_and_then_none.* died with code 3"):
        next(values)


def test_what_a_function_returns_is_measured():
    found = measure_isolated(os.path.join, "a", "b")
    assert found.value == "a/b" and found.seconds < 60 and found.peak_bytes > 2**20


def test_a_process_ends_when_no_more_of_it_is_wanted():
    values = measure_each(without_end)
    process = next(values).value
    values.close()
    assert not os.path.exists(f"/proc/{process}")
