"""The order of batches and updates, and the share of each process."""

import json

import numpy as np
import pytest
from torch.utils.data import Dataset

from metro.data.indexed_file import IndexedFile
from metro.pretraining.batches import (
    Position,
    Share,
    Updates,
    cut_into_batches,
    dealt,
    shuffled,
)
from metro.pretraining.dataset import PretrainingDataset
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import UserError

FIRST_SENTINEL = 1000


def settings(**options) -> PretrainingSettings:
    common = dict(sample_break_mode="complete_doc", shorten_method="random_crop", num_workers=0)
    common |= dict(shorten_data_split_list="train", tokens_per_sample=128, max_tokens=1024)
    return PretrainingSettings(data="data", output_dir="out", **{**common, **options}).resolved()


def text(items, chosen: PretrainingSettings) -> PretrainingDataset:
    return PretrainingDataset(
        items,
        chosen,
        "train",
        is_metro=chosen.is_metro,
        first_sentinel=FIRST_SENTINEL,
        max_width=chosen.max_positions,
    )


class Sentences(list):
    """Ids of as many sentences, each a document."""

    def __init__(self, number: int):
        super().__init__(np.arange(4, 12) for _ in range(number))
        self.sizes = np.array([len(ids) for ids in self])


class Numbers(Dataset):
    """Each example is its number."""

    def __getitem__(self, index):
        return int(index)


def test_every_process_gets_the_batches_of_the_original(original):
    """In the recorded order, of both epochs and for each number of processes."""
    recorded = json.loads((original / "data_pipeline.json").read_text())
    meta, train = recorded["meta"], recorded["t5_metro"]["train"]
    multiple = meta["required_batch_size_multiple"]
    sizes = dict(max_tokens=meta["max_tokens"], required_batch_size_multiple=multiple)
    chosen = settings(**sizes, tokens_per_sample=meta["tokens_per_sample"])
    frozen = cut_into_batches(text(IndexedFile(original / "wiki2tiny-bin/train"), chosen), chosen)
    assert [batch.tolist() for batch in frozen] == train["frozen_batches_before_shuffle"]
    for shards, epochs in train["batch_ids_in_training_order"].items():
        number, process = [int(n) for n in shards.removeprefix("num_shards").split("_shard")]
        for epoch, expected in epochs.items():
            order = shuffled(frozen, meta["seed"], int(epoch.removeprefix("epoch")))
            found = dealt(order, Share(process, number))
            assert [batch.tolist() for batch in found] == expected


@pytest.mark.fairseq
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(("number", "processes", "size"), [(7, 1, 3), (9, 2, 2), (10, 2, 4)])
def test_an_epoch_ends_as_that_of_fairseq(number, processes, size, skips):
    """Oracle: fairseq's iterators, with every process's numbers of examples and of batches."""
    from fairseq.data import iterators

    chosen = settings(update_freq=size, skip_remainder_batch=skips, sample_break_mode="eos")
    chosen.batch_size = chosen.required_batch_size_multiple = 2
    dataset = text(Sentences(2 * number), chosen)
    frozen = cut_into_batches(dataset, chosen)
    assert len(frozen) == number
    for process in range(processes):
        theirs = iterators.EpochBatchIterator(
            dataset=Numbers(),
            collate_fn=list,
            batch_sampler=frozen,
            seed=chosen.seed,
            num_shards=processes,
            shard_id=process,
            skip_remainder_batch=skips,
        ).next_epoch_itr(shuffle=True)
        grouped = iterators.GroupedIterator(theirs, size, skip_remainder_batch=skips)
        expected = [[sorted(batch) for batch in group] for group in grouped]
        updates = Updates(lambda epoch: dataset, chosen, Share(process, processes))
        found = []
        for update in updates:
            micro = update.micro_batches
            found.append([sorted(m.batch.indices.tolist()) if m.counts else [] for m in micro])
            if update.after.epoch == 2:
                break
        assert found == expected


def test_a_run_goes_on_behind_the_same_share_of_the_epoch():
    """By hand: 6 of 12 batches are 3 of 6, and 7 are 3 of 6 too; unknown ones are taken as is."""
    assert [Position(1, done, 12).among(6) for done in (6, 7, 0)] == [3, 3, 0]
    assert Position(1, 3, 6).among(12) == 6
    assert Position(1, 5, 12).among(12) == 5 and Position().among(9) == 0
    chosen = settings(sample_break_mode="eos", batch_size=2, required_batch_size_multiple=2)
    dataset = text(Sentences(24), chosen)
    update = next(iter(Updates(lambda epoch: dataset, chosen, position=Position(2, 3, 6))))
    assert update.after == Position(2, 7, 12)


def test_text_without_an_update_is_refused():
    chosen = settings(sample_break_mode="eos", update_freq=3, skip_remainder_batch=True)
    dataset = text(Sentences(4), chosen)
    with pytest.raises(UserError, match="skip_remainder_batch leaves none with update_freq 3"):
        next(iter(Updates(lambda epoch: dataset, chosen)))
    longest = settings(sample_break_mode="eos", tokens_per_sample=5, shorten_method="none")
    with pytest.raises(UserError, match="more than tokens_per_sample - 1 = 4 tokens"):
        cut_into_batches(text(Sentences(4), longest), longest)
