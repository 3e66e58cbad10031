"""Which examples an epoch holds and in which batches, on folders small enough to count."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from metro.data.prompts.encoding import PromptEncoder
from metro.finetuning.batches import EncodedPrompts, EpochBatches, EpochLoader
from metro.finetuning.data import PromptData
from tests.finetuning.prepared import write_prepared


@pytest.fixture(scope="module")
def encoder(t5_folder):
    return PromptEncoder(AutoTokenizer.from_pretrained(t5_folder))


@pytest.fixture
def data(prepared, encoder):
    def make(objective="flipped", split="train", **options):
        return PromptData(prepared, split, objective, encoder, **{"seed": 1, **options})

    return make


def test_proportional_sampling_reads_every_row_once_under_one_of_its_templates(data):
    """60 rows of each dataset; only every third row has the second template of sentiment."""
    prompts = data()
    assert prompts.sampling == "proportional" and len(prompts) == 120
    drawn = Counter()
    for epoch in range(1, 201):
        plan = prompts.plan(epoch)
        rows = [prompts.rows[t][i] for t, i in zip(plan.tasks, plan.indices, strict=True)]
        assert sorted(rows) == sorted([*range(60), *range(60)])
        drawn.update(zip(plan.tasks.tolist(), rows, strict=True))
    assert all(drawn[0, row] + drawn[1, row] == 200 for row in range(60))
    assert all(drawn[1, row] == 0 for row in range(60) if row % 3)
    second = sum(drawn[1, row] for row in range(0, 60, 3))  # 4,000 fair draws: 2,000 +- 4 sigma
    assert abs(second - 2000) < 4 * 4000**0.5 / 2


def test_capped_sampling_moves_a_window_over_each_task(encoder, tmp_path):
    other = write_prepared(tmp_path / "capped", 60, mixture="t0", caps={"sentiment_how": 25})
    prompts = PromptData(other, "train", "direct", encoder, seed=1)
    assert prompts.sampling == "capped" and len(prompts) == 25 + 20 + 60
    window = [set(prompts.plan(epoch).indices[:25].tolist()) for epoch in (1, 2)]
    assert len(window[0]) == 25 and not window[0] & window[1]


def test_a_limit_holds_per_task_or_dataset(data):
    assert len(data("direct", sampling="capped", limit=7)) == 21
    assert len(data(limit=7)) == 14
    with pytest.raises(ValueError, match="the limit is 0"):
        data(limit=0)


def test_examples_depend_on_seed_and_epoch_alone(data, encoder):
    """The same from another object, in another order, and after pickling; new in a new epoch."""

    def read(prompts, epoch, order):
        return {i: [x.tolist() for x in prompts.encode(i, epoch)[1:4]] for i in order}

    first = read(data(), 1, range(120))
    assert read(data(), 1, reversed(range(120))) == first
    assert read(pickle.loads(pickle.dumps(data())), 1, range(120)) == first
    again = data()
    read(again, 2, range(10))
    assert read(again, 1, range(120)) == first
    assert read(data(seed=2), 1, range(120)) != first
    topic = range(60, 120)  # three answer choices: about half of the wrong labels are new
    wrong = [[read(data(), epoch, topic)[i][2] for i in topic] for epoch in (1, 2)]
    changed = sum(a != b for a, b in zip(*wrong, strict=True))
    assert 15 < changed < 45


def test_examples_without_use_are_replaced_and_counted(tmp_path, encoder):
    """Every fourth row has a single answer choice; in training others stand in for them."""

    def single(example):
        if example["row"] % 4 == 0:
            example = {**example, "answer_choices": [example["target"]], "label": 0}
        return example

    folder = write_prepared(tmp_path / "data", 60, change=single)
    prompts = PromptData(folder, "train", "flipped", encoder, seed=1)
    encoded = [prompts.encode(i, 1) for i in range(len(prompts))]
    assert all(example.wrong_source_ids is not None for example in encoded)
    assert sum(example.num_skipped > 0 for example in encoded) == 30
    plain = PromptData(folder, "train", "flipped", encoder, seed=1, replace=False)
    assert sum(plain.encode(i, 1) is None for i in range(len(plain))) == 30
    assert all(PromptData(folder, "train", "direct", encoder, seed=1).encode(i, 1) for i in (0, 1))


def test_an_instruction_cut_to_its_sentinels_is_not_trained_on(tmp_path, encoder):
    """Room for two ids and the end: both are sentinels for the one template, not for the others."""

    def two_sentinels(example):
        if example["task"] == "topic_about":
            example = {**example, "instruction": "<extra_id_0>  <extra_id_1> What is it about?"}
        return example

    folder = write_prepared(tmp_path / "data", 30, change=two_sentinels)
    short = PromptEncoder(encoder.tokenizer, max_target_length=3)
    prompts = PromptData(folder, "train", "flipped", short, seed=1, replace=False)
    encoded = [prompts.encode(i, 1) for i in range(len(prompts))]
    assert sum(example is None for example in encoded) == 30  # the rows of topic
    enough = PromptEncoder(encoder.tokenizer, max_target_length=4)
    prompts = PromptData(folder, "train", "flipped", enough, seed=1, replace=False)
    assert all(prompts.encode(i, 1) is not None for i in range(len(prompts)))


def test_data_without_a_single_usable_example_is_refused(tmp_path, encoder):
    folder = write_prepared(
        tmp_path / "data", 60, change=lambda example: {**example, "answer_choices": None}
    )
    prompts = PromptData(folder, "train", "flipped", encoder, seed=1)
    with pytest.raises(ValueError, match="under the objective flipped .no answer choices"):
        prompts.encode(0, 1)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format": "fairseq"}, "binarised prompts"),
        ({"format": "jsonl"}, "no examples in the split 'train'"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_refused(tmp_path, encoder, manifest, message):
    manifest |= {"mixture": "mix", "splits": {"train": {}}}
    (tmp_path / "prompts.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        PromptData(tmp_path, "train", "direct", encoder, seed=1)


def test_estimated_lengths_order_examples_as_their_tokens(data):
    """Oracle: the encoded examples; rank correlation of the topic task, 3 to 13 tokens long."""
    prompts = data("direct", sampling="capped")
    estimated = prompts.lengths(1)
    encoded = [prompts.encode(i, 1) for i in range(len(prompts))]
    real = np.array([len(e.source_ids) + len(e.target_ids) for e in encoded])
    topic = slice(80, 140)
    assert np.corrcoef(estimated[topic], real[topic])[0, 1] > 0.95
    assert abs(estimated.mean() - real.mean()) < 1


# --- batches ---


def test_an_epoch_of_batches_holds_every_example_once(data):
    prompts = data()
    batches = EpochBatches(prompts, 8, seed=3)
    keys = [key for batch in batches for key in batch]
    assert len(batches) == 15 and sorted(keys) == [(1, i) for i in range(120)]
    batches.set_epoch(1)  # the Trainer counts from 0
    assert next(iter(batches))[0][0] == 2


@pytest.mark.parametrize("batching", ["length", "random"])
def test_processes_share_the_batches_of_one(data, batching):
    prompts = data()
    together = EpochBatches(prompts, 5, seed=3, num_processes=2, batching=batching)
    parts = [
        EpochBatches(prompts, 5, seed=3, process=p, num_processes=2, batching=batching)
        for p in (0, 1)
    ]
    assert [len(part) for part in parts] == [12, 12]
    both = [b for pair in zip(*parts, strict=True) for b in pair]
    assert [[i for _, i in batch] for batch in both] == together.positions().tolist()


def test_length_grouping_leaves_less_padding_than_random_batches(data):
    def padding(batching: str) -> float:
        prompts = data("direct", sampling="capped")
        lengths = np.array([len(prompts.encode(i, 1).source_ids) for i in range(len(prompts))])
        batches = EpochBatches(prompts, 7, seed=3, batching=batching).positions()
        return 1 - lengths[batches].sum() / (lengths[batches].max(1) * 7).sum()

    assert padding("length") < 0.3 * padding("random")


def test_loader_processes_change_nothing(data):
    def read(num_workers: int) -> list:
        dataset = EncodedPrompts(data())
        batches = EpochBatches(dataset.data, 8, seed=3)
        loader = EpochLoader(
            dataset, batch_sampler=batches, collate_fn=list, num_workers=num_workers
        )
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            found += [[[x.tolist() for x in e[1:4]] for e in batch] for batch in loader]
        return found

    assert read(0) == read(2)


def test_a_mixture_smaller_than_a_batch_is_read_round(data):
    batches = EpochBatches(data(limit=1), 8, seed=3)
    assert len(batches) == 1
    assert Counter(i for _, i in next(iter(batches))) == {0: 4, 1: 4}
