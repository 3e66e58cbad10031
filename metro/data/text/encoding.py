"""Chunks of text to ids, in worker processes: decode, normalise, encode.

Lines of plain text are items, an empty one is an item of its own that separates documents. A jsonl
record or a dataset's record is a document: its non-blank lines are items, followed by a separator.
A separator consists of ``</s>`` alone, and so does a line without any token.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metro.data.text.reading import Chunk, Skip
from metro.modeling.text_metro_t5 import EOS_ID, SPM_FILE, Vocabulary, normalize_text
from metro.utils.characters import bad_character


class EncodedChunk(NamedTuple):
    """The items of a chunk, in order."""

    ids: np.ndarray
    """Concatenated ids of all items, each ending with ``</s>``."""
    sizes: np.ndarray
    """int32, ids per item; 1 is a separator of documents."""
    skips: list[Skip]
    """Lines that cannot be used."""


class ChunkEncoder:
    """Encodes a chunk into items."""

    def __init__(self, vocabulary: Path, lower: bool, dtype: np.dtype):
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(vocabulary / SPM_FILE))
        self.vocabulary = Vocabulary(processor, vocabulary)  # already verified by the parent
        self.lower, self.dtype = lower, dtype

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        skips = list(chunk.skips)
        if chunk.is_documents:
            items = list(self._encode_documents(documents(chunk, skips)))
        else:
            items = self.vocabulary.encode_texts(text_lines(chunk, skips), self.lower)
        sizes = np.fromiter(map(len, items), dtype=np.int32, count=len(items))
        ids = np.fromiter(chain.from_iterable(items), dtype=self.dtype, count=int(sizes.sum()))
        return EncodedChunk(ids, sizes, skips)

    def _encode_documents(self, texts: Iterator[str]) -> Iterator[list[int]]:
        for text in texts:
            encoded = self.vocabulary.encode_texts(text.split("\n"), self.lower)
            if items := [item for item in encoded if len(item) > 1]:
                yield from items
                yield [EOS_ID]


class WordCounter:
    """Counts the normalised words of a chunk."""

    def __init__(self, lower: bool):
        self.lower = lower

    def __call__(self, chunk: Chunk) -> Counter[str]:
        texts = documents(chunk, []) if chunk.is_documents else text_lines(chunk, [])
        return Counter(
            chain.from_iterable(normalize_text(text, self.lower).split() for text in texts)
        )


def text_lines(chunk: Chunk, skips: list[Skip]) -> list[str]:
    """Return the lines of a chunk of plain text; append unusable ones to ``skips``."""
    assert isinstance(chunk.payload, bytes)
    try:
        lines = chunk.payload.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = []
    if not lines or b"\0" in chunk.payload:
        return [line for _, line in _decoded_lines(chunk, skips)]
    if not lines[-1]:
        lines.pop()
    return lines


def documents(chunk: Chunk, skips: list[Skip]) -> Iterator[str]:
    """Yield the text of each record of a chunk; append records without usable text to ``skips``."""
    numbered: Iterable[tuple[int, str]]
    if isinstance(chunk.payload, list):
        numbered = enumerate(chunk.payload, start=chunk.first_line)
    else:
        numbered = _json_texts(chunk, skips)
    for number, text in numbered:
        if found := bad_character(text):
            skips.append(Skip(number, found))
        else:
            yield text


def _json_texts(chunk: Chunk, skips: list[Skip]) -> Iterator[tuple[int, str]]:
    for number, line in _decoded_lines(chunk, skips):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            skips.append(Skip(number, "not JSON"))
            continue
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(text, str):
            yield number, text
        else:
            skips.append(Skip(number, "no string field 'text'"))


def _decoded_lines(chunk: Chunk, skips: list[Skip]) -> Iterator[tuple[int, str]]:
    first_line = chunk.first_line + len(chunk.skips)  # an over-long line can only be the first
    assert isinstance(chunk.payload, bytes)
    lines = chunk.payload.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=first_line):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            skips.append(Skip(number, "not valid UTF-8"))
            continue
        if found := bad_character(text):
            skips.append(Skip(number, found))
        else:
            yield number, text
