"""What the tasks make of a data folder, against the original's recorded blocks and batches."""

import json
import zlib

import numpy as np
import pytest
from fairseq.data import Dictionary, iterators

import fairseq_plugins  # noqa: F401
from fairseq_plugins.tasks.t5 import T5Config, T5Task
from fairseq_plugins.tasks.t5_metro import T5MetroConfig, T5MetroTask

TASKS = {"t5_metro": (T5MetroTask, T5MetroConfig), "t5": (T5Task, T5Config)}


def build_task(name, data, tokens_per_sample=128, **options):
    task, config = TASKS[name]
    cfg = config(
        data=str(data),
        sample_break_mode="complete_doc",
        tokens_per_sample=tokens_per_sample,
        shorten_method="random_crop",
        shorten_data_split_list="train",
        seed=1,
        **options,
    )
    return task.setup_task(cfg)


@pytest.fixture(scope="module", params=["t5_metro", "t5"])
def task_and_recorded(request, original):
    recorded = json.loads((original / "data_pipeline.json").read_text())
    task = build_task(request.param, original / "wiki2tiny-bin")
    for split in ("train", "valid"):
        task.load_dataset(split, epoch=1)
    return task, recorded[request.param], recorded["meta"]


def batch_iterator(task, split, meta, epoch=1, **options):
    return task.get_batch_iterator(
        task.dataset(split),
        max_tokens=meta["max_tokens"],
        max_positions=meta["tokens_per_sample"],
        ignore_invalid_inputs=True,
        required_batch_size_multiple=meta["required_batch_size_multiple"],
        seed=meta["seed"],
        epoch=epoch,
        disable_iterator_cache=True,
        **options,
    )


def crc(ids) -> int:
    return zlib.crc32(np.asarray(ids).astype("<i8").tobytes())


def test_blocks_equal_those_of_the_original(task_and_recorded):
    task, recorded, _ = task_and_recorded
    for split in ("train", "valid"):
        dataset = task.dataset(split)
        assert len(dataset) == recorded[split]["n_blocks"]
        assert dataset.sizes.tolist() == recorded[split]["block_sizes_incl_bos"]


def test_examples_equal_those_of_the_original_in_both_epochs(task_and_recorded):
    task, recorded, _ = task_and_recorded
    for split in ("train", "valid"):
        dataset = task.dataset(split)
        for epoch in (1, 2):
            dataset.set_epoch(epoch)
            for expected in recorded[split]["items"][f"epoch{epoch}"]:
                example = dataset[expected["index"]]
                if task.__class__ is T5MetroTask:
                    source = example.masked_ids
                    target = np.where(example.is_masked, example.original_ids, 1)
                    assert crc(target) == expected["generator_target_crc32"]
                    assert crc(example.original_ids) == expected["unmasked_crc32"]
                else:
                    source = example.input_ids
                    assert crc(example.target_ids) == expected["target_crc32"]
                assert crc(source) == expected["src_crc32"]
                assert len(source) == expected["src_len"]
        dataset.set_epoch(1)


def test_batches_equal_those_of_the_original_in_order_and_shards(task_and_recorded):
    task, recorded, meta = task_and_recorded
    frozen = batch_iterator(task, "train", meta).frozen_batches
    assert [b.tolist() for b in frozen] == recorded["train"]["frozen_batches_before_shuffle"]
    for shards, epochs in recorded["train"]["batch_ids_in_training_order"].items():
        num_shards, shard = [int(n) for n in shards.removeprefix("num_shards").split("_shard")]
        for epoch, expected in epochs.items():
            iterator = batch_iterator(
                task,
                "train",
                meta,
                epoch=int(epoch.removeprefix("epoch")),
                num_shards=num_shards,
                shard_id=shard,
            )
            batches = list(iterator.next_epoch_itr(shuffle=True))
            assert [b["id"].tolist() if b else [] for b in batches] == expected
    task.dataset("train").set_epoch(1)
    iterator = batch_iterator(task, "valid", meta)
    frozen = [b.tolist() for b in iterator.frozen_batches]
    assert frozen == recorded["valid"]["frozen_batches_before_shuffle"]
    batches = list(iterator.next_epoch_itr(shuffle=False))
    assert [b["id"].tolist() for b in batches] == recorded["valid"]["batch_ids_in_order"]


@pytest.mark.parametrize("name", ["t5_metro", "t5"])
def test_a_batch_equals_that_of_the_original(name, original):
    """Oracle: the recorded batch of six items, masks of epoch 3."""
    arrays = np.load(original / f"forward_{'a' if name == 't5_metro' else 'c'}.npz")
    task = build_task(name, original / "wiki2tiny-bin")
    task.load_dataset("train")
    dataset = task.dataset("train")
    dataset.set_epoch(3)
    batch = dataset.collater([dataset[i] for i in arrays["sample_indices"]])
    assert batch["id"].tolist() == arrays["id"].tolist()
    found = {**batch, **batch["net_input"]}
    names = ["src_tokens", "src_lengths", "prev_output_tokens"]
    names += ["target"] if name == "t5" else []
    for field in names:
        assert np.array_equal(found[field].numpy(), arrays[field]), field
    net_input = batch["net_input"]
    widest, shortest = net_input["src_tokens"].shape[1], int(net_input["src_lengths"].min())
    assert net_input["has_padding"] is (shortest < widest)
    if name == "t5_metro":
        assert batch["ntokens"] == 468 and batch["nsentences"] == 6
        assert np.array_equal(net_input["original_ids"].numpy(), arrays["discriminator_target"])
        is_masked = arrays["generator_target"] != 1
        assert np.array_equal(net_input["is_masked"].numpy(), is_masked)
        assert net_input["max_masked"] == int(net_input["is_masked"].sum(1).max())
    else:
        assert batch["ntokens"] == 89  # target tokens: what the loss is divided by


@pytest.mark.parametrize("num_workers", [0, 2])
def test_masks_change_with_the_epoch_for_any_number_of_loader_processes(corpus, num_workers):
    """fairseq's persistent loader processes would repeat the masks of epoch 1 for ever."""
    task = build_task("t5_metro", corpus, tokens_per_sample=32)
    task.load_dataset("train")
    iterator = task.get_batch_iterator(
        task.dataset("train"), max_sentences=8, num_workers=num_workers, seed=1
    )
    assert isinstance(iterator, iterators.EpochBatchIterator)
    seen = []
    for _ in range(2):
        masks = {}
        for batch in iterator.next_epoch_itr(shuffle=True):
            is_masked = batch["net_input"]["is_masked"]
            for index, mask in zip(batch["id"].tolist(), is_masked, strict=True):
                masks[index] = mask.nonzero().tolist()
        seen.append(masks)
    assert seen[0].keys() == seen[1].keys()
    assert seen[0] != seen[1]


def test_sampling_seeds_depend_on_epoch_and_item_alone(corpus):
    task = build_task("t5_metro", corpus, tokens_per_sample=32)
    task.load_dataset("train")
    dataset = task.dataset("train")
    one = dataset.collater([dataset[i] for i in (3, 1)])["net_input"]["sampling_seed"]
    other = dataset.collater([dataset[i] for i in (1, 0, 2)])["net_input"]["sampling_seed"]
    assert one[1] == other[0]
    dataset.set_epoch(2)
    assert dataset.collater([dataset[1]])["net_input"]["sampling_seed"][0] != other[0]


def test_the_published_sentinels_follow_the_vocabulary(corpus):
    task = build_task("t5_metro", corpus, tokens_per_sample=32)
    size = len(Dictionary.load(str(corpus / "dict.txt")))
    assert task.dictionary.index("<sen000>") == task.first_sentinel == size
    assert task.dictionary.index("<sen031>") == size + 31 == len(task.dictionary) - 1
