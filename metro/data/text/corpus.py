"""Text to pretraining data: normalise, encode, split into train and valid, write fairseq's format.

The output folder holds ``train.bin/.idx``, ``valid.bin/.idx``, ``dict.txt``, ``sp.model`` and a
manifest, ready for ``fairseq-train``. One line is one item and ends with ``</s>``; an item of
``</s>`` alone separates documents, as ``sample_break_mode: complete_doc`` wants. Neither the number
of workers, nor where chunks are cut, nor an interruption changes a byte of it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from metro.data import DEFAULT_VALID_FRACTION
from metro.data.prepared_folder import TEXT_MANIFEST, PreparedFolder
from metro.data.text import reading as text_input
from metro.data.text.encoding import WordCounter
from metro.data.text.preparation import Preparation, PreparationState, Progress
from metro.data.text.reading import TextSource
from metro.data.text.vocabulary import (
    MIN_VOCAB_SIZE,
    merge_counts,
    sample_chunks,
    train_vocabulary,
)
from metro.modeling.text_metro_t5 import Vocabulary
from metro.utils.messages import UserError
from metro.utils.worker_pool import available_cores, map_in_order

FORMAT_VERSION = 1


class PreparedText(NamedTuple):
    """What ``prepare_text`` made."""

    folder: Path
    manifest: dict
    """Settings, counts, notes, and size and checksum of every file."""
    was_finished: bool
    """The folder was complete before, and nothing was done."""


def prepare_text(
    inputs: list[str],
    out: str | Path,
    *,
    vocab: str | Path | None = None,
    train_vocab: int | None = None,
    lower: bool = True,
    num_workers: int | None = None,
    valid_fraction: float = DEFAULT_VALID_FRACTION,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PreparedText:
    """Turn text into a folder that ``fairseq-train`` reads; continue an earlier, killed call.

    Args:
        inputs: files (plain text, ``.jsonl`` with a ``text`` field, ``.gz`` of both), or
            ``hf:DATASET[:CONFIG]``. Between two of them stands a document boundary.
        out: folder to make. It appears when it is complete.
        vocab: folder with ``sp.model`` and ``dict.txt``.
        train_vocab: train a vocabulary of that many ids on the inputs instead.
        lower: fold to lower case.
        num_workers: processes; default all cores.
        valid_fraction: share of the documents set aside for validation; 0 writes no validation set.
        overwrite: replace an output, or an unfinished run, that was made with other settings.
        say: receives the few lines that a user should read.
        progress: called after each chunk.
    """
    if (vocab is None) == (train_vocab is None):
        raise UserError("give a vocabulary: either --vocab DIR or --train-vocab N")
    if train_vocab is not None and train_vocab < MIN_VOCAB_SIZE:
        raise UserError(f"--train-vocab is {train_vocab}, and must be at least {MIN_VOCAB_SIZE}")
    if not 0 <= valid_fraction < 1:
        raise UserError(f"--valid-fraction is {valid_fraction}, and must be at least 0 and below 1")
    num_workers = available_cores() if num_workers is None else num_workers
    if num_workers < 1:
        raise UserError(f"--workers is {num_workers}, and must be at least 1")
    sources = text_input.open_sources(inputs)
    settings = {
        "format": FORMAT_VERSION,
        "inputs": [source.fingerprint() for source in sources],
        "vocab": _vocabulary_digest(Vocabulary.from_folder(vocab))
        if vocab
        else f"train {train_vocab}",
        "lower": lower,
        "valid_fraction": valid_fraction,
    }
    folder = PreparedFolder(
        Path(out), settings, TEXT_MANIFEST, "metro prepare-text", checksums=True
    )
    if finished := folder.finished_manifest(overwrite):
        say(f"{folder.out} is already finished; nothing to do")
        return PreparedText(folder.out, finished, True)
    earlier = folder.open(overwrite)
    if earlier and "files" in earlier:  # killed while the finished files were being moved
        return PreparedText(folder.out, folder.complete(), False)
    if earlier:
        state = PreparationState.from_json(earlier)
        say(
            f"continuing after {state.train.num_items + state.valid.num_items:,} items, "
            f"in {sources[state.position.source].name} at line {state.position.line + 1:,}"
        )
    else:
        state = PreparationState()
        try:
            _place_vocabulary(
                folder, sources, vocab, train_vocab, lower, num_workers, say, progress
            )
        except ValueError:
            folder.discard()
            raise
        folder.save_state(asdict(state))
    preparation = Preparation(folder, sources, state, valid_fraction)
    preparation.encode_all(lower, num_workers, progress)
    manifest = folder.complete(preparation.finish(say))
    return PreparedText(folder.out, manifest, False)


def _vocabulary_digest(vocabulary: Vocabulary) -> str:
    checksums = "".join(vocabulary.checksums().values())
    return "sha256:" + hashlib.sha256(checksums.encode()).hexdigest()[:32]


def _place_vocabulary(
    folder: PreparedFolder,
    sources: list[TextSource],
    vocab: str | Path | None,
    train_vocab: int | None,
    lower: bool,
    num_workers: int,
    say: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> None:
    """Put ``sp.model`` and ``dict.txt`` into the work folder: copied, or trained on the inputs."""
    if vocab is not None:
        if lower is False and not Vocabulary.from_folder(vocab).is_cased:
            say(f"warning: {vocab} has no capitals, so --cased has little effect")
        folder.copy_vocabulary(Path(vocab))
        return
    total = text_input.total_bytes(sources)
    before = text_input.bytes_before(sources)

    def counted():
        for chunk, counts in map_in_order(
            WordCounter, (lower,), sample_chunks(sources), num_workers
        ):
            progress(
                Progress("counting words", before[chunk.end.source] + chunk.bytes_on_disk, total)
            )
            yield counts

    counts = merge_counts(counted())
    if not counts:
        raise UserError("no text in the input to train a vocabulary on")
    progress(Progress("training the vocabulary", 0, None))
    train_vocabulary(counts, train_vocab, lower, folder.partial)
    Vocabulary.from_folder(folder.partial)  # raises unless the two files agree
