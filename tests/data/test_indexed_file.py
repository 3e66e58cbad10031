"""Indexed files are those that fairseq writes, of any size."""

import shutil

import numpy as np

from metro.data.indexed_file import IndexedFileWriter, WritePosition
from tests.data.prepared import items_of


def test_writer_reproduces_recorded_files(golden, tmp_path):
    """Oracle: fairseq's own files; written in two parts with a crash's leftovers between them."""
    prefix = tmp_path / "recorded"
    for suffix in (".bin", ".idx"):
        recorded = golden / f"prompt_T0-bin/train/taskA_yesno/train.src-tgt.src{suffix}"
        shutil.copyfile(recorded, prefix.with_suffix(suffix))
    items = items_of(prefix)
    sizes = np.array([*map(len, items)], np.int32)
    ids = np.concatenate(items).astype(np.uint16)
    half, split = 20, int(sizes[:20].sum())
    writer = IndexedFileWriter(tmp_path / "train", np.uint16)
    writer.append(ids[:split], sizes[:half])
    position = writer.position
    writer.append(ids[:77], np.array([77]))
    writer.close()
    writer = IndexedFileWriter(tmp_path / "train", np.uint16, WritePosition(*position))
    writer.append(ids[split:], sizes[half:])
    writer.finish()
    for suffix in (".bin", ".idx"):
        written = (tmp_path / "train").with_suffix(suffix).read_bytes()
        assert written == prefix.with_suffix(suffix).read_bytes()


def test_index_of_items_beyond_four_gigabytes_has_exact_offsets(tmp_path, monkeypatch):
    """Oracle: offsets are sums of sizes; the data file is sparse."""
    monkeypatch.setattr("metro.data.indexed_file._ITEMS_AT_ONCE", 2)
    sizes = np.array([1_500_000_000, 3, 2_000_000_000, 5, 7], np.int32)
    (tmp_path / "big.sizes").write_bytes(sizes.tobytes())
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(2 * int(sizes.sum(dtype=np.int64)))
    position = WritePosition(5, int(sizes.sum(dtype=np.int64)))
    IndexedFileWriter(tmp_path / "big", np.uint16, position).finish()
    starts = np.frombuffer((tmp_path / "big.idx").read_bytes(), "<i8", 5, 26 + 20)
    assert starts.tolist() == [0, 3_000_000_000, 3_000_000_006, 7_000_000_006, 7_000_000_016]
