"""What `benchmarks.flipped_training` times stands for what it does not."""

from statistics import fmean

import pytest

from benchmarks.flipped_training import GROUP, draw_batches


def lengths(num_updates):
    return [len(source) for batch in draw_batches(5, num_updates) for source, _, _ in batch]


def test_examples_of_the_timed_updates_are_as_long_as_all():
    assert fmean(lengths(8)) == pytest.approx(fmean(lengths(GROUP)), rel=0.03)
