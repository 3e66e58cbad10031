"""Reader of training text in chunks of complete lines: plain text, jsonl, .gz of both, datasets.

Chunks come in order and can start at the end of any earlier chunk, so an interrupted run can be
resumed. Memory holds one chunk, or one line where that is longer.
"""

import glob
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from metro.data.datasets import hub_errors
from metro.data.prepared_folder import TEXT_MANIFEST
from metro.utils.characters import refuse_utf16
from metro.utils.identity import digest, files_identity
from metro.utils.messages import MissingPackage, UserError
from metro.utils.network import use_cache_without_network

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
HF_PREFIX = "hf:"
_UTF8_BOM = b"\xef\xbb\xbf"


class ReadPosition(NamedTuple):
    """A position between two lines of the inputs."""

    source: int
    """Index of the input."""
    offset: int
    """Bytes (of the decompressed text), or records of a dataset, read so far."""
    line: int
    """Lines or records read so far."""


START = ReadPosition(0, 0, 0)


class Skip(NamedTuple):
    """A line that cannot be used."""

    line: int
    """Its number, counted from 1."""
    reason: str


class Chunk(NamedTuple):
    """Some complete lines of one input."""

    payload: bytes | list[str]
    """Lines of a file, or whole documents of a dataset."""
    is_jsonl: bool
    first_line: int
    """Number of the first line, counted from 1."""
    end: ReadPosition
    bytes_on_disk: int
    """Bytes up to its end, of the source as it is stored (compressed, if it is)."""
    skips: tuple[Skip, ...] = ()
    """Lines skipped because of their length."""

    @property
    def is_documents(self) -> bool:
        """True for records, False for lines of plain text."""
        return self.is_jsonl or isinstance(self.payload, list)


@dataclass(frozen=True)
class TextSource:
    """One ``--input``, a file or ``hf:DATASET[:CONFIG]``; or a part of a file for a shard."""

    name: str
    start: int = 0
    """Byte at which the part begins."""
    end: int | None = None
    """Byte behind the part; None: it ends with the file."""

    @property
    def label(self) -> str:
        """Its name for messages, which count lines from its beginning."""
        return f"{self.name} (from byte {self.start:,})" if self.start else self.name

    @property
    def is_dataset(self) -> bool:
        return self.name.startswith(HF_PREFIX)

    @property
    def is_gzip(self) -> bool:
        return self.name.endswith(".gz")

    @property
    def is_jsonl(self) -> bool:
        return self.name.removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json"))

    def size(self) -> int | None:
        """Return the bytes on disk, None where unknown."""
        if self.is_dataset:
            return None
        return (os.path.getsize(self.name) if self.end is None else self.end) - self.start

    def fingerprint(self) -> dict:
        """Return the facts that must not change before an interrupted run is resumed."""
        if self.end is not None:
            part = np.memmap(self.name, np.uint8, "r", self.start, (self.end - self.start,))
            place = {"bytes": [self.start, self.end]}
            return {"name": self.name, **place, "content": digest([part.data])}
        paths = [Path(self.name)]
        if self.is_dataset:
            folder = Path(self.dataset_and_config()[0])
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {"name": self.name, "content": files_identity(paths)}

    def dataset_and_config(self) -> tuple[str, str | None]:
        dataset, _, config = self.name.removeprefix(HF_PREFIX).partition(":")
        return dataset, config or None

    def chunks(self, index: int, start: ReadPosition) -> Iterator[Chunk]:
        """Yield the chunks from ``start`` on; ``index`` is the number of this source."""
        if self.is_dataset:
            return _dataset_chunks(self, index, start)
        return _file_chunks(self, index, start)


def open_sources(names: list[str]) -> list[TextSource]:
    """Check that every input can be read, before any work is done.

    Args:
        names: files, folders (all files in them, but hidden ones), patterns such as ``*.txt``, or
            datasets.

    Raises:
        UserError: no input, or files that do not exist (all of them are named).
    """
    if not names:
        raise UserError("no input: give --input FILE")
    sources = [TextSource(name) for given in names for name in _inputs_named(str(given))]
    paths = [Path(source.name) for source in sources if not source.is_dataset]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise UserError(f"no such input file: {', '.join(missing)}")
    for path in paths:
        refuse_utf16(path)
        if path.name.removesuffix(".gz").endswith((".parquet", ".arrow")):
            raise UserError(f"{path} is not text: write it as .jsonl, with a field `text`")
    return sources


def _inputs_named(name: str) -> list[str]:
    """Return the files of a folder or pattern, in the order of their names; else the name."""
    if name.startswith(HF_PREFIX) or os.path.isfile(name):
        return [name]
    if (Path(name) / TEXT_MANIFEST).is_file():
        raise UserError(f"the folder {name} is not text: metro prepare-text made it of text")
    pattern = os.path.join(glob.escape(name), "**") if os.path.isdir(name) else name
    found = sorted(filter(os.path.isfile, glob.iglob(pattern, recursive=True)))
    if not found and os.path.isdir(name):
        raise UserError(f"the folder {name} has no files: name another one, or files")
    return found or [name]


def read_chunks(sources: list[TextSource], start: ReadPosition = START) -> Iterator[Chunk]:
    """Yield all chunks of all sources in order, from ``start`` on."""
    for index in range(start.source, len(sources)):
        here = start if index == start.source else ReadPosition(index, 0, 0)
        here = here._replace(offset=max(here.offset, sources[index].start))
        yield from sources[index].chunks(index, here)


def _file_chunks(source: TextSource, index: int, start: ReadPosition) -> Iterator[Chunk]:
    with open(source.name, "rb") as raw:
        stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if source.is_gzip else raw
        try:
            stream.seek(start.offset)
            for payload, skips, end in _split_lines(stream, index, start, source.end):
                first_line, start = start.line + 1, end
                on_disk = raw.tell() - source.start
                yield Chunk(payload, source.is_jsonl, first_line, end, on_disk, skips)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{source.name} is not a complete gzip file ({error}); it can be read up to line "
                f"{start.line}"
            ) from None


def _split_lines(
    stream: BinaryIO | gzip.GzipFile, index: int, start: ReadPosition, stop: int | None
) -> Iterator[tuple[bytes, tuple[Skip, ...], ReadPosition]]:
    """Yield (complete lines, skips, position after them) until the stream or the part ends.

    Lines are skipped for their length alone, whatever the cuts between chunks.
    """
    offset, line = start.offset, start.line
    parts: list[bytes] = []  # of a line that has not ended yet
    length = 0  # of that line, also where it is too long to be kept
    while True:
        left = CHUNK_BYTES if stop is None else stop - offset - length
        block = stream.read(min(CHUNK_BYTES, left))
        newline = block.find(b"\n")
        if block and newline < 0:
            length += len(block)
            parts = parts + [block] if length <= MAX_LINE_BYTES else []
            continue
        if not block and not length:
            return
        # The first line ends here: at the newline, or with the file.
        first = length + newline if block else length
        cut = block.rfind(b"\n") + 1
        skips: tuple[Skip, ...] = ()
        if first > MAX_LINE_BYTES:
            skips = (Skip(line + 1, f"longer than {MAX_LINE_BYTES} bytes"),)
            payload = block[newline + 1 : cut]
            num_lines = 1 + payload.count(b"\n")
        else:
            payload = b"".join(parts) + block[:cut]
            num_lines = payload.count(b"\n") + (not block)
        if offset == 0:
            payload = payload.removeprefix(_UTF8_BOM)
        offset, line = offset + length + cut, line + num_lines
        yield payload, skips, ReadPosition(index, offset, line)
        parts, length = [block[cut:]], len(block) - cut


def _dataset_chunks(source: TextSource, index: int, start: ReadPosition) -> Iterator[Chunk]:
    records = _dataset_records(source, start.offset)
    while True:
        texts: list[str] = []
        num_chars = 0
        for record in records:
            text = record.get("text")
            if not isinstance(text, str):
                raise UserError(
                    f"{source.name}: record {start.line + len(texts) + 1} has no string field "
                    f"'text'; its fields are {sorted(record)}"
                )
            texts.append(text)
            num_chars += len(text)
            if num_chars >= CHUNK_BYTES:
                break
        if not texts:
            return
        end = ReadPosition(index, start.offset + len(texts), start.line + len(texts))
        yield Chunk(texts, False, start.line + 1, end, 0)
        start = end


def _dataset_records(source: TextSource, start: int) -> Iterator[dict]:
    try:
        import datasets
    except ImportError:
        raise MissingPackage(f"reading {source.name}", "datasets", "train") from None
    dataset, config = source.dataset_and_config()
    if not Path(dataset).exists():
        use_cache_without_network()
    try:
        yield from datasets.load_dataset(dataset, config, split="train", streaming=True).skip(start)
    except hub_errors(datasets) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"cannot read {source.name}: {reason}; without a network, give its text as a file"
        ) from None


def total_bytes(sources: list[TextSource]) -> int | None:
    """Sum up the bytes on disk of all sources; None where one is of unknown size."""
    sizes = [size for source in sources if (size := source.size()) is not None]
    return sum(sizes) if len(sizes) == len(sources) else None


def bytes_before(sources: list[TextSource]) -> list[int]:
    """Sum up the bytes on disk before each source; an unknown size counts as 0."""
    return list(itertools.accumulate((source.size() or 0 for source in sources), initial=0))
