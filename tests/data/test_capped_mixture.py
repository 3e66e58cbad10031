"""The capped mixture against the original's recorded epochs (``golden/prompt_finetune.json``)."""

import json

import numpy as np
import pytest

from metro.data.capped_mixture import CappedMixture, order_by_source_and_target

SIZES, CAPS = [50, 30], [20, 100]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_epochs_equal_the_original(golden, epoch):
    recorded = json.loads((golden / "prompt_finetune.json").read_text())
    want = recorded["epochs"][f"epoch{epoch}"]["dataset_and_sample_index"]
    mixture = CappedMixture(SIZES, CAPS, seed=1)
    assert np.stack(mixture.all_rows(epoch), 1).tolist() == want
    assert [list(mixture.locate(i, epoch)) for i in range(len(mixture))] == want


def test_the_window_meets_every_example_equally_often():
    """7 of 10 rows an epoch: ten epochs meet each row seven times, two in a row no row thrice."""
    mixture = CappedMixture([10], [7], seed=3)
    rows = np.concatenate([mixture.rows(0, epoch) for epoch in range(1, 11)])
    assert np.bincount(rows).tolist() == [7] * 10
    assert all(len(set(mixture.rows(0, epoch).tolist())) == 7 for epoch in range(1, 11))


def test_other_tasks_do_not_change_what_is_taken_of_one():
    alone = CappedMixture([50], [20], seed=1).rows(0, 2)
    assert CappedMixture([8, 50, 9], [4, 20, None], seed=1).rows(1, 2).tolist() == alone.tolist()


def test_order_is_by_source_then_target_then_seed():
    """Hand-made: source lengths 2 1 2 2, target lengths 5 9 4 4; ties as permutation(4) says."""
    ties = np.random.RandomState(0).permutation(4).tolist()
    first, second = sorted([2, 3], key=ties.index)
    order = order_by_source_and_target(np.array([2, 1, 2, 2]), np.array([5, 9, 4, 4]), seed=0)
    assert order.tolist() == [1, first, second, 0]


@pytest.mark.parametrize(
    ("sizes", "caps", "message"),
    [
        ([3], [0], "the cap of task 0 is 0"),
        ([3], [1, 2], "1 tasks but 2 caps"),
        ([0, 0], [1, 1], "without a single example"),
        ([], [], "without a single example"),
    ],
)
def test_what_makes_no_mixture_is_refused(sizes, caps, message):
    with pytest.raises(ValueError, match=message):
        CappedMixture(sizes, caps, seed=1)
