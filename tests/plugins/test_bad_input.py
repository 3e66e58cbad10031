"""Mistakes that users make: each is refused with the value and what to do."""

import shutil

import pytest
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from metro.data.indexed_file import check_split
from metro.utils.locks import locked
from metro.utils.messages import UserError
from tests.plugins.conftest import TINY, configure, write_corpus
from tests.plugins.test_data import TASKS, build_task


def test_data_folder_without_dictionary(tmp_path):
    with pytest.raises(ValueError, match=f"no dict.txt in the data folder {tmp_path}; it is writ"):
        build_task("t5_metro", tmp_path)


def test_missing_split_names_the_file(corpus):
    task = build_task("t5_metro", corpus, 32)
    with pytest.raises(UserError, match="no data at .*test.idx; check task.data"):
        task.load_dataset("test")


def test_missing_validation_data_names_how_to_go_without(train, corpus, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("dict.txt", "train.idx", "train.bin"):
        shutil.copy(corpus / name, data)
    with pytest.raises(UserError, match=r"valid.idx.*disable_validation=true \(--disable-"):
        train(tmp_path / "save", "--max-update 1", data=data)
    train(tmp_path / "save", "--max-update 1 --disable-validation", data=data)


def test_folder_that_another_run_saves_into(train, tmp_path):
    save_dir = tmp_path / "save"
    with locked(save_dir, inside=True), pytest.raises(UserError, match="save is being written by"):
        train(save_dir, "--max-update 1")
    train(save_dir, "--max-update 1")
    assert (save_dir / "checkpoint_last.pt").is_file()


def test_index_without_its_data(corpus, tmp_path):
    for name in ("dict.txt", "train.idx"):
        shutil.copy(corpus / name, tmp_path)
    task = build_task("t5_metro", tmp_path, 32)
    with pytest.raises(ValueError, match="train.idx is there but .*train.bin is missing; .* copy"):
        task.load_dataset("train")


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_cut_and_damaged_splits_are_named(corpus, tmp_path, suffix):
    """Oracle: every bit of the header and of some sizes and offsets changed, one by one."""
    for name in ("train.idx", "train.bin"):
        shutil.copyfile(corpus / name, tmp_path / name)
    path = tmp_path / f"train{suffix}"
    content = path.read_bytes()
    check_split(tmp_path / "train")
    bits = [] if suffix == ".bin" else [*range(26 * 8), *range(26 * 8, len(content) * 8, 997)]
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.(idx|bin) (is cut or|is dam|has)"):
            check_split(tmp_path / "train")
    for cut in (content[:-1], content + b"x", content[:20]):
        path.write_bytes(cut)
        with pytest.raises(UserError, match=r"train\.(idx|bin) (is cut or|is dam|has)"):
            check_split(tmp_path / "train")


def test_empty_shard(corpus, tmp_path):
    write_corpus(tmp_path / "empty", num_documents=0)
    task = build_task("t5_metro", f"{corpus}:{tmp_path / 'empty'}", 32)
    with pytest.raises(ValueError, match=r"empty/train.bin is empty .*leave this shard out of"):
        task.load_dataset("train", epoch=1, combine=True)  # at once, not in epoch 2


def test_shard_with_nothing_but_document_ends(corpus, tmp_path):
    import numpy as np
    import torch
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    shutil.copy(corpus / "dict.txt", tmp_path)
    builder = MMapIndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint16)
    for _ in range(3):
        builder.add_item(torch.tensor([2]))
    builder.finalize(str(tmp_path / "train.idx"))
    task = build_task("t5_metro", tmp_path, 32)
    with pytest.raises(ValueError, match="holds 3 items but not one block of text"):
        task.load_dataset("train")


def test_shards_of_different_vocabularies(corpus, tmp_path):
    write_corpus(tmp_path / "other", num_documents=1)
    (tmp_path / "other/dict.txt").write_text("[MASK] 1\nword 1\n")
    with pytest.raises(ValueError, match="other/dict.txt differs from .*same vocabulary"):
        build_task("t5_metro", f"{corpus}:{tmp_path / 'other'}", 32)


def test_data_of_a_larger_vocabulary(corpus, tmp_path):
    """Its ids would pass for sentinels."""
    write_corpus(tmp_path / "data", num_documents=5)
    words = (tmp_path / "data/dict.txt").read_text().splitlines()
    (tmp_path / "data/dict.txt").write_text("\n".join(words[:40]) + "\n")
    task = build_task("t5_metro", tmp_path / "data", 32)
    task.load_dataset("train")
    with pytest.raises(ValueError, match="train holds id .* but dict.txt ends at id 43; use the"):
        task.dataset("train")[0]


def test_shards_are_read_in_turn(corpus, tmp_path):
    write_corpus(tmp_path / "other", num_documents=7)
    task = build_task("t5", f"{corpus}:{tmp_path / 'other'}", 32)
    lengths = []
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        lengths.append(len(task.dataset("train")))
    assert lengths[0] == lengths[2] > lengths[1] > 0


def test_dictionary_that_already_has_sentinels(tmp_path):
    (tmp_path / "dict.txt").write_text("[MASK] 1\n<sen000> 1\n")
    with pytest.raises(ValueError, match="already holds <sen000>"):
        build_task("t5_metro", tmp_path, 32)


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("t5_metro", "mask_stdev", 1.0, "mask_stdev is 1.0; .* set it to 0"),
        ("t5_metro", "tokens_per_sample", 2, "tokens_per_sample is 2; .*use at least 3"),
        ("t5_metro", "mask_prob", 1.5, "mask_prob is 1.5; .*use 0 to 1"),
        ("t5", "mask_prob", -0.1, "mask_prob is -0.1; .*use 0 to 1"),
        ("t5", "mask_prob", float("nan"), "mask_prob is nan; .*use 0 to 1"),
        ("t5", "empty_prob", 2.0, "empty_prob is 2.0; .*use 0 to 1"),
        ("t5_metro", "leave_unmasked_prob", -0.1, "leave_unmasked_prob is -0.1; .*use 0 to 1"),
        ("t5_metro", "random_token_prob", 1.1, "random_token_prob is 1.1; .*use 0 to 1"),
        ("t5_metro", "random_token_prob", 0.95, "random_token_prob is 1.05; together they are at"),
        ("t5_metro", "mask_multiple_length", 0, "mask_multiple_length is 0; use 1 or more"),
        ("t5", "mask_multiple_length", 0, "mask_multiple_length is 0; use 1 or more"),
    ],
)
def test_task_options_out_of_range(name, option, value, message):
    task, config = TASKS[name]
    cfg = OmegaConf.structured(config)
    cfg.data, cfg.seed = "nowhere", 1
    cfg[option] = value
    with pytest.raises(ValueError, match=message):
        task(cfg, Dictionary())


@pytest.mark.parametrize("name", ["t5", "t5_metro"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_range_are_valid(name, value, corpus):
    task = build_task(name, corpus, 32, mask_prob=value)
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[i] for i in range(4)])
    if name == "t5_metro":
        net_input = batch["net_input"]
        masked = net_input["is_masked"].sum(1).tolist()
        assert masked == [int(n * value) for n in net_input["src_lengths"]]


def test_checkpoint_of_another_vocabulary(train, tmp_path):
    """The reason must not hide behind fairseq's "please ensure that the architectures match"."""
    write_corpus(tmp_path / "data", num_documents=20)
    train(tmp_path / "save", "--max-update 1", data=tmp_path / "data")
    with (tmp_path / "data/dict.txt").open("a") as file:
        file.write("further 1\nwords 1\n")
    with pytest.raises(ValueError, match="vocabulary of 132 entries .* task one of 134 .*dict.txt"):
        train(tmp_path / "save", "--max-update 2", data=tmp_path / "data")


def test_checkpoint_of_another_size(train, corpus, tmp_path):
    train(tmp_path / "a", "--max-update 1 --disable-validation")
    start = f"--finetune-from-model {tmp_path / 'a/checkpoint_last.pt'} --max-update 1"
    message = r"checkpoint_last.pt does not fit the model: size mismatch for .* 16\D.*and \d+ more"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "b", start, "--encoder-embed-dim 32")


def test_a_missing_architecture_is_named(corpus, capsys):
    """fairseq's error is a RuntimeError without a word."""
    with pytest.raises(SystemExit) as stopped:
        configure(corpus, *TINY, "--task t5_metro --criterion t5_metro")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --arch is missing; give a model: t5_metro_base_rpe, ")
