"""Text to pretraining data: normalise, encode, split into train and valid, write fairseq's format.

The output folder holds ``train.bin/.idx``, ``valid.bin/.idx``, ``dict.txt``, ``sp.model`` and a
manifest, ready for ``fairseq-train``. One line is one item and ends with ``</s>``; an item of
``</s>`` alone separates documents, as ``sample_break_mode: complete_doc`` wants. Neither the number
of workers, nor where chunks are cut, nor an interruption changes a byte of it.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from metro.data.prepared_folder import TEXT_MANIFEST, PreparedFolder
from metro.data.settings import PrepareTextSettings
from metro.data.text import reading as text_input
from metro.data.text.encoding import WordCounter
from metro.data.text.preparation import Preparation, PreparationState
from metro.data.text.reading import TextSource
from metro.data.text.vocabulary import (
    merge_counts,
    read_vocabulary,
    sample_chunks,
    train_vocabulary,
)
from metro.modeling.text_metro_t5 import Vocabulary
from metro.utils.messages import UserError
from metro.utils.progress import Progress
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
    settings: PrepareTextSettings | None = None,
    *,
    progress: bool | Progress = True,
    **options: Any,
) -> PreparedText:
    """Turn text into a folder that ``fairseq-train`` reads; resume an earlier, killed call.

    Args:
        settings: all options, or give them one by one.
        progress: show progress on stderr.
        options: fields of `PrepareTextSettings`, such as ``inputs``, ``out`` and ``vocab``.

    Raises:
        UserError: an option is wrong, or there is no text.
    """
    settings = PrepareTextSettings.of(settings, **options)
    with Progress.of(progress) as shown:
        return _prepare(settings, shown)


def _prepare(options: PrepareTextSettings, progress: Progress) -> PreparedText:
    inputs, vocab, train_vocab = options.inputs, options.vocab, options.train_vocab
    lower, overwrite = not options.cased, options.overwrite
    num_workers = options.num_workers or available_cores()
    sources = text_input.open_sources(inputs)
    settings = {
        "format": FORMAT_VERSION,
        "inputs": [source.fingerprint() for source in sources],
        "vocab": _vocabulary_digest(read_vocabulary(vocab)) if vocab else f"train {train_vocab}",
        "lower": lower,
        "valid_fraction": options.valid_fraction,
    }
    folder = PreparedFolder(
        options.out, settings, TEXT_MANIFEST, "metro prepare-text", checksums=True
    )
    if finished := folder.finished_manifest(overwrite):
        progress.say(f"{folder.out} is already finished; nothing to do")
        return PreparedText(folder.out, finished, True)
    earlier = folder.open(overwrite)
    if earlier and "files" in earlier:  # killed while the finished files were being moved
        return PreparedText(folder.out, folder.complete(), False)
    if earlier:
        state = PreparationState.from_json(earlier)
        progress.say(
            f"continuing after {state.train.num_items + state.valid.num_items:,} items, "
            f"in {sources[state.position.source].name} at line {state.position.line + 1:,}"
        )
    else:
        state = PreparationState()
        try:
            _place_vocabulary(folder, sources, vocab, train_vocab, lower, num_workers, progress)
        except ValueError:
            folder.discard()
            raise
        folder.save_state(asdict(state))
    preparation = Preparation(folder, sources, state, options.valid_fraction)
    preparation.encode_all(lower, num_workers, progress)
    manifest = folder.complete(preparation.finish(progress))
    return PreparedText(folder.out, manifest, False)


def _vocabulary_digest(vocabulary: Vocabulary) -> str:
    checksums = "".join(vocabulary.checksums().values())
    return "sha256:" + hashlib.sha256(checksums.encode()).hexdigest()[:32]


def _place_vocabulary(
    folder: PreparedFolder,
    sources: list[TextSource],
    vocab: Path | None,
    train_vocab: int | None,
    lower: bool,
    num_workers: int,
    progress: Progress,
) -> None:
    """Put ``sp.model`` and ``dict.txt`` into the work folder: copied, or trained on the inputs."""
    if vocab is not None:
        if lower is False and not read_vocabulary(vocab).is_cased:
            progress.say(f"warning: {vocab} has no capitals, so --cased has little effect")
        folder.copy_vocabulary(vocab)
        return
    total = text_input.total_bytes(sources)
    before = text_input.bytes_before(sources)

    def counted():
        for chunk, counts in map_in_order(
            WordCounter, (lower,), sample_chunks(sources), num_workers
        ):
            done = before[chunk.end.source] + chunk.bytes_on_disk
            progress.show("counting words", done, total)
            yield counts

    counts = merge_counts(counted())
    if not counts:
        raise UserError("no text in the input to train a vocabulary on")
    progress.say("training the vocabulary")
    train_vocabulary(counts, train_vocab, lower, folder.partial)
    read_vocabulary(folder.partial)  # raises unless the two files agree
