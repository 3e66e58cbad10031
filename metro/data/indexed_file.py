"""Resumable writer of fairseq's memory-mapped format, ``<split>.bin`` and ``<split>.idx``.

``.bin`` holds all ids, item after item; ``.idx`` a header, the int32 size of every item, and the
int64 byte offset of every item. The index needs all sizes, so they are kept in ``<split>.sizes``
beside the data: memory use does not grow with the number of items.
"""

import contextlib
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from metro.modeling.text_metro_t5 import DICT_FILE
from metro.utils.checksums import AT_START, refuse_damage
from metro.utils.messages import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
OTHER_FORMATS = (b"TNTIDX", b"HUFFIDX")
"""How the indices of fairseq's other formats begin, which are left to it."""
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
"""Types of ids by fairseq's codes."""
_HEADER = struct.Struct("<QBQ")
_DTYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.uint32): 9}
_SIZE_DTYPE, _POINTER_DTYPE = np.dtype("<i4"), np.dtype("<i8")
_ITEMS_AT_ONCE = 1 << 20


def best_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of ids that fairseq chooses for a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.uint32)


class WritePosition(NamedTuple):
    """Amount of data in a pair of files."""

    num_items: int
    num_tokens: int


START = WritePosition(0, 0)


class IndexedFileWriter:
    """Appends items to ``<prefix>.bin``; ``finish`` writes ``<prefix>.idx``.

    Opened on files of an interrupted run it continues at ``position`` and discards what follows.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, position: WritePosition = START):
        self.dtype = np.dtype(dtype)
        self.num_items, self.num_tokens = position
        self.bin_path, self.idx_path, self.sizes_path = (
            prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".sizes")
        )
        self._bin = open_at(self.bin_path, self.num_tokens * self.dtype.itemsize)
        self._sizes = open_at(self.sizes_path, self.num_items * _SIZE_DTYPE.itemsize)

    @property
    def position(self) -> WritePosition:
        return WritePosition(self.num_items, self.num_tokens)

    def append(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Add ``len(sizes)`` items, whose ids are concatenated in ``ids``."""
        assert ids.dtype == self.dtype and len(ids) == sizes.sum()
        self._bin.write(ids.tobytes())
        self._sizes.write(sizes.astype(_SIZE_DTYPE).tobytes())
        self.num_items += len(sizes)
        self.num_tokens += len(ids)

    def flush(self) -> None:
        """Make all appended items survive a crash of the machine."""
        for file in (self._bin, self._sizes):
            file.flush()
            os.fsync(file.fileno())

    def read_last(self, num_items: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and sizes of the last ``num_items`` items."""
        assert 0 <= num_items <= self.num_items
        self._bin.flush()
        self._sizes.flush()
        skipped = (self.num_items - num_items) * _SIZE_DTYPE.itemsize
        sizes = np.fromfile(self.sizes_path, _SIZE_DTYPE, offset=skipped)
        first_token = self.num_tokens - int(sizes.sum())
        ids = np.fromfile(self.bin_path, self.dtype, offset=first_token * self.dtype.itemsize)
        return ids, sizes

    def truncate(self, position: WritePosition) -> None:
        """Discard all items after ``position``."""
        self.num_items, self.num_tokens = position
        for file, size in (
            (self._bin, self.num_tokens * self.dtype.itemsize),
            (self._sizes, self.num_items * _SIZE_DTYPE.itemsize),
        ):
            file.truncate(size)  # flushes first
            file.seek(size)

    def close(self) -> None:
        """Close; what was not flushed may be lost, as where the disk is full."""
        for file in (self._bin, self._sizes):
            with contextlib.suppress(OSError):
                file.close()

    def finish(self) -> None:
        """Write the index and close. The ``.sizes`` file stays, so this step can be repeated."""
        self.flush()
        self.close()
        with self.idx_path.open("wb") as index, self.sizes_path.open("rb") as sizes_file:
            index.write(MAGIC + _HEADER.pack(VERSION, _DTYPE_CODES[self.dtype], self.num_items))
            shutil.copyfileobj(sizes_file, index)
            sizes_file.seek(0)
            start = 0
            while part := sizes_file.read(_ITEMS_AT_ONCE * _SIZE_DTYPE.itemsize):
                sizes = np.frombuffer(part, _SIZE_DTYPE)
                ends = start + np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
                starts = np.concatenate([np.array([start]), ends[:-1]])
                index.write(starts.astype(_POINTER_DTYPE).tobytes())
                start = int(ends[-1])
            index.flush()
            os.fsync(index.fileno())


def check_indexed_file(prefix: Path) -> None:
    """Check that ``<prefix>.idx`` is whole and describes ``<prefix>.bin``, without reading that.

    Raises:
        UserError: one of them was cut or damaged.
    """
    index, tokens = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    remedy = "copy it again or binarise the text again"
    with index.open("rb") as file:
        magic = file.read(len(MAGIC))
        if magic.startswith(OTHER_FORMATS):
            return
        start = file.read(_HEADER.size)
        whole = len(start) == _HEADER.size
        version, code, num_items = _HEADER.unpack(start) if whole else (0, 0, 0)
        itemsize = np.dtype(_DTYPES[code]).itemsize if code in _DTYPES else 0
        before = len(MAGIC) + _HEADER.size
        size = before + num_items * (_SIZE_DTYPE.itemsize + _POINTER_DTYPE.itemsize)
        if magic != MAGIC or version != VERSION or not itemsize or size != index.stat().st_size:
            raise UserError(f"{index} is cut or damaged: {remedy}")
        end = 0
        for first in range(0, num_items, _ITEMS_AT_ONCE):
            count = min(_ITEMS_AT_ONCE, num_items - first)
            file.seek(before + first * _SIZE_DTYPE.itemsize)
            sizes = np.fromfile(file, _SIZE_DTYPE, count).astype(np.int64) * itemsize
            place = num_items * _SIZE_DTYPE.itemsize + first * _POINTER_DTYPE.itemsize
            file.seek(before + place)
            starts = np.fromfile(file, _POINTER_DTYPE, count)
            ends = end + np.cumsum(sizes)
            if sizes.min() < 0 or not np.array_equal(starts, ends - sizes):
                raise UserError(f"{index} is damaged: its offsets do not fit its sizes; {remedy}")
            end = int(ends[-1])
    if end != tokens.stat().st_size:
        raise UserError(
            f"{tokens} has {tokens.stat().st_size} bytes where {index.name} says {end}: {remedy}"
        )


def check_shards(folders: Sequence[Path], split: str) -> None:
    """Check a split of all shards, of all together no more bytes than of one, see `check_split`."""
    for folder in folders:
        check_split(folder / split, AT_START // len(folders))


def check_split(path: Path, most_bytes: int = AT_START) -> None:
    """Refuse a missing, half missing, empty, cut or damaged split.

    Args:
        path: such as ``data/train``.
        most_bytes: that are read for their checksums.
    """
    index, tokens = (path.with_name(path.name + suffix) for suffix in (".idx", ".bin"))
    if not index.exists():
        without = (
            "; to train without validation: dataset.disable_validation=true (--disable-validation)"
        )
        raise UserError(
            f"no data at {index}; check task.data (a folder made by `metro prepare-text` or "
            "fairseq-preprocess) and the split names (dataset.train_subset, dataset.valid_subset)"
            + ("" if path.name.startswith("train") else without)
        )
    if not tokens.exists():
        raise UserError(
            f"{index} is there but {tokens} is missing; a split needs both: copy the .bin "
            "file as well, or binarise the text again"
        )
    if tokens.stat().st_size == 0:
        raise UserError(
            f"{tokens} is empty (0 bytes); leave this shard out of task.data or binarise its "
            "text again"
        )
    check_indexed_file(path)
    refuse_damage(path.parent, [index.name, tokens.name], most_bytes=most_bytes)


def check_dictionaries(folders: Sequence[Path]) -> Path:
    """Return the dict.txt of the first shard; the others must have the same, or none."""
    first, *others = (folder / DICT_FILE for folder in folders)
    if not first.exists():
        raise UserError(
            f"no {DICT_FILE} in the data folder {folders[0]}; it is written by "
            "`metro prepare-text` and fairseq-preprocess: copy the one that the data was "
            "binarised with, or check task.data"
        )
    for path in others:
        if path.exists() and path.read_bytes() != first.read_bytes():
            raise UserError(
                f"{path} differs from {first}; all shards must be binarised with the same "
                "vocabulary"
            )
    return first


class IndexedFile:
    """The items of ``<prefix>.bin``, memory-mapped; pickled as its path."""

    def __init__(self, prefix: Path):
        self.prefix = prefix
        index = prefix.with_name(prefix.name + ".idx")
        with index.open("rb") as file:
            magic, header = file.read(len(MAGIC)), file.read(_HEADER.size)
        if magic != MAGIC:
            raise UserError(f"{index} is of another format: binarise the text again")
        _, code, num_items = _HEADER.unpack(header)
        before = len(MAGIC) + _HEADER.size
        sizes_end = before + num_items * _SIZE_DTYPE.itemsize
        dtype = np.dtype(_DTYPES[code])
        self.sizes = np.memmap(index, _SIZE_DTYPE, "r", before, num_items)
        starts = np.memmap(index, _POINTER_DTYPE, "r", sizes_end, num_items)
        self._starts, self._itemsize = starts, dtype.itemsize
        self._ids = np.memmap(prefix.with_name(prefix.name + ".bin"), dtype, "r")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self._starts[index]) // self._itemsize
        return self._ids[start : start + int(self.sizes[index])].astype(np.int64)

    def __reduce__(self):
        return IndexedFile, (self.prefix,)


def open_at(path: Path, num_bytes: int) -> BinaryIO:
    """Open for writing and keep the first ``num_bytes``."""
    file = path.open("r+b" if path.exists() else "w+b")
    found = file.seek(0, os.SEEK_END)
    if found < num_bytes:
        file.close()
        raise UserError(
            f"{path} has {found} bytes where {num_bytes} were written before the interruption: it "
            "was changed since; start again with --overwrite"
        )
    file.truncate(num_bytes)
    file.seek(num_bytes)
    return file
