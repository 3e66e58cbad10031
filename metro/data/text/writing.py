"""The output of text preparation: items into train and valid, and the state to resume from."""

import time
from dataclasses import asdict, dataclass, field

import numpy as np

from metro.data.indexed_file import IndexedFileWriter, WritePosition, best_dtype
from metro.data.prepared_folder import PreparedFolder
from metro.data.text import reading
from metro.data.text.encoding import ChunkEncoder, EncodedChunk
from metro.data.text.ngrams import reference_bits
from metro.data.text.reading import Chunk, ReadPosition, TextSource
from metro.data.text.vocabulary import read_vocabulary
from metro.modeling.text_metro_t5 import EOS_ID, UNK_ID
from metro.utils.messages import UserError
from metro.utils.progress import Progress
from metro.utils.seeds import draws
from metro.utils.worker_pool import map_in_order

CHECKPOINT_SECONDS = 5.0
_MAX_SKIP_EXAMPLES = 10


@dataclass
class CorpusState:
    """Progress of a run: with the files on disk, all that is needed to resume it."""

    position: ReadPosition = reading.START
    train: WritePosition = WritePosition(0, 0)
    valid: WritePosition = WritePosition(0, 0)
    num_documents: int = 0
    num_text_items: int = 0
    """Items other than separators, in train and valid together."""
    num_unknown: int = 0
    ends_with_separator: bool = True
    """The next item begins a document."""
    source_of_last_item: int = 0
    last_train_document: int = 0
    """Number of the first item of train's last document."""
    items_per_source: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    skip_examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: dict) -> "CorpusState":
        """Restore what ``PreparedFolder.save_state`` wrote."""
        content = {key: value for key, value in content.items() if key != "settings"}
        content["position"] = ReadPosition(*content["position"])
        content["train"] = WritePosition(*content["train"])
        content["valid"] = WritePosition(*content["valid"])
        return cls(**content)


class CorpusWriter:
    """Writes the items of a corpus into train and valid, and keeps the state."""

    def __init__(
        self,
        folder: PreparedFolder,
        sources: list[TextSource],
        state: CorpusState,
        fraction: float,
    ):
        self.folder, self.sources, self.state, self.fraction = folder, sources, state, fraction
        self.vocab_size = len(read_vocabulary(folder.partial))
        self.dtype = best_dtype(self.vocab_size)
        self.train = IndexedFileWriter(folder.partial / "train", self.dtype, state.train)
        self.valid = IndexedFileWriter(folder.partial / "valid", self.dtype, state.valid)

    def encode_all(self, lower: bool, num_workers: int, progress: Progress) -> None:
        """Encode the rest of the inputs."""
        total, before = reading.total_bytes(self.sources), reading.bytes_before(self.sources)
        chunks = reading.read_chunks(self.sources, self.state.position)
        arguments = (self.folder.partial, lower, self.dtype)
        saved = time.monotonic()
        for chunk, encoded in map_in_order(ChunkEncoder, arguments, chunks, num_workers):
            self._add(chunk, encoded)
            progress.show("encoding", before[chunk.end.source] + chunk.bytes_on_disk, total)
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        self._save()

    def finish(self, progress: Progress) -> dict:
        """Make sure that both splits have items, write the indices, return the manifest's facts.

        Raises:
            UserError: there is no text.
        """
        state = self.state
        skips = self._describe_skips()
        if not state.num_text_items:
            self.folder.discard()
            names = ", ".join(source.label for source in self.sources)
            raise UserError(f"no text in the input ({names}): {skips or 'all files are empty'}")
        if self.fraction and not self.valid.num_items:
            self._fill_validation()
        for source in self.sources:
            if not state.items_per_source.get(source.label):
                progress.say(f"warning: {source.label} is empty or has no usable text")
        if skips:
            progress.say(f"warning: {skips}")
        for note in state.notes:
            progress.say(f"note: {note}")
        counts = {
            "documents": state.num_documents,
            "lines": state.num_text_items,
            "train_items": self.train.num_items,
            "train_tokens": self.train.num_tokens,
            "valid_items": self.valid.num_items,
            "valid_tokens": self.valid.num_tokens,
            "unknown_tokens": state.num_unknown,
            "vocab_size": self.vocab_size,
        }
        self.train.finish()
        reference = None
        if self.fraction:
            self.valid.finish()
            progress.say("counting n-grams")
            train, valid = (
                np.memmap(each.bin_path, self.dtype, "r") for each in (self.train, self.valid)
            )
            reference = reference_bits(train, valid, self.vocab_size)
        else:
            self.valid.close()
            self.valid.bin_path.unlink()
        return {
            "counts": counts,
            "reference_bits": reference,
            "items_per_input": state.items_per_source,
            "skipped": state.skipped,
            "skip_examples": state.skip_examples,
            "notes": state.notes,
        }

    def close(self) -> None:
        self.train.close()
        self.valid.close()

    def _add(self, chunk: Chunk, encoded: EncodedChunk) -> None:
        state, name = self.state, self.sources[chunk.end.source].label
        ids, sizes = encoded.ids, encoded.sizes
        state.position = chunk.end
        if len(sizes) and state.source_of_last_item != chunk.end.source:
            state.source_of_last_item = chunk.end.source
            if not state.ends_with_separator:
                ids, sizes = np.insert(ids, 0, EOS_ID), np.insert(sizes, 0, 1)
        is_text = sizes > 1
        follows_separator = np.concatenate([[state.ends_with_separator], ~is_text[:-1]])
        starts_document = is_text & follows_separator[: len(sizes)]
        # Separators belong to the document before them, or to the first one.
        document = np.maximum(state.num_documents - 1 + np.cumsum(starts_document), 0)
        is_valid = is_validation_document(document, self.fraction)
        train_starts = np.flatnonzero(starts_document[~is_valid])
        if len(train_starts):
            state.last_train_document = self.train.num_items + int(train_starts[-1])
        is_valid_id = np.repeat(is_valid, sizes)
        self.valid.append(ids[is_valid_id], sizes[is_valid])
        self.train.append(ids[~is_valid_id], sizes[~is_valid])
        state.num_documents += int(starts_document.sum())
        state.num_text_items += int(is_text.sum())
        state.num_unknown += int(np.count_nonzero(ids == UNK_ID))
        state.items_per_source[name] = state.items_per_source.get(name, 0) + int(is_text.sum())
        if len(sizes):
            state.ends_with_separator = not is_text[-1]
        for skip in encoded.skips:
            state.skipped[skip.reason] = state.skipped.get(skip.reason, 0) + 1
            if len(state.skip_examples) < _MAX_SKIP_EXAMPLES:
                state.skip_examples.append(f"{name}:{skip.line}: {skip.reason}")

    def _save(self) -> None:
        """Write the data to disk, then the state that counts on it."""
        self.train.flush()
        self.valid.flush()
        self.state.train, self.state.valid = self.train.position, self.valid.position
        self.folder.save_state(asdict(self.state))

    def _fill_validation(self) -> None:
        """Move the last document, or a part of the only one, to an empty validation set."""
        state, train = self.state, self.train
        num_moved = train.num_items - state.last_train_document
        if state.num_documents > 1:
            note = (
                f"none of the {state.num_documents} documents was drawn for the validation set at "
                f"fraction {self.fraction:g}: it is the last document"
            )
        else:
            num_separators = num_moved - state.num_text_items
            num_lines = max(1, round(self.fraction * state.num_text_items))
            num_moved = min(num_lines, max(1, state.num_text_items - 1)) + num_separators
            note = (
                "the input is one document (no empty line): its last lines are the validation set"
            )
            if state.num_text_items == 1:
                note = "the input is a single line: the validation set is a copy of it"
        ids, sizes = train.read_last(num_moved)
        self.valid.append(ids, sizes)
        self.valid.flush()
        state.notes.append(note)
        keep = train.position
        if state.num_text_items > 1:
            keep = WritePosition(train.num_items - num_moved, train.num_tokens - len(ids))
        # The state first: a run killed here is resumed with the shorter train files.
        state.train, state.valid = keep, self.valid.position
        self.folder.save_state(asdict(state))
        train.truncate(keep)

    def _describe_skips(self) -> str:
        parts = [f"{count:,} {reason}" for reason, count in sorted(self.state.skipped.items())]
        first = "".join(f"\n  {example}" for example in self.state.skip_examples)
        return f"lines skipped: {', '.join(parts)}; the first ones:{first}" if parts else ""


def is_validation_document(index: np.ndarray, fraction: float) -> np.ndarray:
    """Draw the documents of the validation set by their number alone, never document 0."""
    return (draws(index).astype(np.float64) < fraction * 2.0**64) & (index > 0)
