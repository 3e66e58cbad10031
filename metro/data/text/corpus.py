"""Text to pretraining data: normalise, encode, split into train and valid, write fairseq's format.

The output folder holds ``train.bin/.idx``, ``valid.bin/.idx``, ``dict.txt``, ``sp.model`` and a
manifest, ready for pretraining. One line is one item and ends with ``</s>``; an item of
``</s>`` alone separates documents, as ``sample_break_mode: complete_doc`` expects. The output is
the same to the byte whatever the number of workers, the cuts between chunks and interruptions.
"""

import hashlib
from dataclasses import asdict, replace
from typing import Any

from metro.data.prepared_folder import TEXT_MANIFEST, Prepared, PreparedFolder
from metro.data.settings import PrepareTextSettings
from metro.data.text import reading, shards
from metro.data.text.reading import TextSource
from metro.data.text.vocabulary import count_words, read_vocabulary, train_vocabulary
from metro.data.text.writing import CorpusState, CorpusWriter
from metro.modeling.text_metro_t5 import SPM_FILE, Vocabulary
from metro.utils.files import naming
from metro.utils.messages import UserError, shortened
from metro.utils.progress import Progress
from metro.utils.worker_pool import available_cores

TEXT_FORMAT_VERSION = 1


def prepare_text(
    settings: PrepareTextSettings | None = None,
    *,
    progress: bool | Progress = True,
    **options: Any,
) -> Prepared:
    """Turn text into a folder that pretraining reads; resume an earlier, killed call.

    Args:
        settings: all options, or give them one by one.
        progress: show progress on stderr.
        options: fields of `PrepareTextSettings`, such as ``inputs``, ``out`` and ``vocab``.

    Raises:
        UserError: an option is wrong, or there is no text.
    """
    settings = PrepareTextSettings.of(settings, **options)
    with Progress.of(progress) as shown:
        sources = reading.open_sources(settings.inputs)
        if len(sources) > len(settings.inputs):  # of folders or patterns
            shown.say(f"reading {shortened(source.name for source in sources)}")
        if settings.shards:
            return _prepare_shards(settings, settings.shards, sources, shown)
        shards.refuse_other_shards(settings.out, [])
        return _prepare(settings, sources, sources, shown)


def _prepare_shards(
    settings: PrepareTextSettings, number: int, corpus: list[TextSource], progress: Progress
) -> Prepared:
    """Make one shard; or all that are missing, check the others, and list them as one corpus."""
    out, names = settings.out, shards.names(number)
    shards.refuse_other_shards(out, names)
    chosen = range(number) if settings.shard is None else [settings.shard]
    sources = {shard: shards.sources_of(corpus, shard, number) for shard in chosen}
    done = []
    for shard in chosen:
        own = replace(settings, out=out / names[shard])
        if shard:
            vocab = settings.vocab or out / names[0]
            if not settings.vocab and not (vocab / SPM_FILE).exists():
                raise UserError(f"no {SPM_FILE} in {vocab} yet: make shard 0 first (--shard 0)")
            own = replace(own, vocab=vocab, train_vocab=None, valid_fraction=0.0)
        progress.say(f"shard {shard} of {number}")
        done.append(_prepare(own, sources[shard], corpus, progress))
        if not done[-1].was_finished:
            (out / TEXT_MANIFEST).unlink(missing_ok=True)  # which lists the shard of before
    if settings.shard is not None:
        return done[0]
    return Prepared(out, shards.join(out, names), all(one.was_finished for one in done))


def _prepare(
    settings: PrepareTextSettings,
    sources: list[TextSource],
    corpus: list[TextSource],
    progress: Progress,
) -> Prepared:
    """Make one folder.

    Args:
        settings: of the folder.
        sources: its text.
        corpus: what a vocabulary is trained on.
        progress: shows it.
    """
    lower, overwrite = not settings.cased, settings.overwrite
    vocabulary = read_vocabulary(settings.vocab) if settings.vocab else None
    inputs = []
    for number, source in enumerate(sources):
        progress.show("reading the inputs", number, len(sources), source.name)
        inputs.append(source.fingerprint())
    facts = {
        "format": TEXT_FORMAT_VERSION,
        "inputs": inputs,
        "vocab": _digest(vocabulary) if vocabulary else f"train {settings.train_vocab}",
        "lower": lower,
        "valid_fraction": settings.valid_fraction,
    }
    folder = PreparedFolder(settings.out, facts, TEXT_MANIFEST, "metro prepare-text")
    if finished := folder.finished_manifest(overwrite):
        progress.say(f"{folder.out} is already finished; nothing to do")
        return Prepared(folder.out, finished, True)
    earlier = folder.open(overwrite)
    if earlier and "files" in earlier:  # killed while the finished files were being moved
        return Prepared(folder.out, folder.complete(), False)
    with naming(folder.partial):
        return _prepare_files(settings, sources, corpus, vocabulary, folder, earlier, progress)


def _prepare_files(
    settings: PrepareTextSettings,
    sources: list[TextSource],
    corpus: list[TextSource],
    vocabulary: Vocabulary | None,
    folder: PreparedFolder,
    earlier: dict | None,
    progress: Progress,
) -> Prepared:
    lower = not settings.cased
    num_workers = settings.num_workers or available_cores()
    if earlier:
        state = CorpusState.from_json(earlier)
        progress.say(
            f"continuing after {state.train.num_items + state.valid.num_items:,} items, "
            f"in {sources[state.position.source].label} at line {state.position.line + 1:,}"
        )
    else:
        state = CorpusState()
        if vocabulary:
            if settings.cased and not vocabulary.is_cased:
                progress.say(
                    f"warning: {settings.vocab} has no capitals, so --cased has little effect"
                )
            folder.copy_vocabulary(vocabulary.folder)
        else:
            try:
                counts = count_words(corpus, lower, num_workers, progress)
                progress.say("training the vocabulary")
                assert settings.train_vocab is not None  # see PrepareTextSettings.check
                train_vocabulary(counts, settings.train_vocab, lower, folder.partial)
            except UserError:
                folder.discard()
                raise
        folder.save_state(asdict(state))
    writer = CorpusWriter(folder, sources, state, settings.valid_fraction)
    try:
        writer.encode_all(lower, num_workers, progress)
        facts = writer.finish(progress)
    finally:
        writer.close()
    return Prepared(folder.out, folder.complete(facts), False)


def _digest(vocabulary: Vocabulary) -> str:
    checksums = "".join(vocabulary.checksums().values())
    return "sha256:" + hashlib.sha256(checksums.encode()).hexdigest()[:32]
