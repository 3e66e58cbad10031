"""Training of a vocabulary like the published ones: SentencePiece unigram model and ``dict.txt``.

The settings are those stored in the published ``sp.model`` files. As there, the input is the words
of the normalised text with their frequencies, so memory and time depend on the distinct words only.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from metro.data.text.encoding import WordCounter
from metro.data.text.reading import Chunk, TextSource, bytes_before, read_chunks, total_bytes
from metro.modeling.text_metro_t5 import (
    DICT_FILE,
    NUM_SPECIAL_IDS,
    SPM_FILE,
    VOCABULARY_FILES,
    Vocabulary,
)
from metro.utils.checksums import refuse_damage
from metro.utils.messages import UserError
from metro.utils.progress import Progress
from metro.utils.worker_pool import map_in_order

SAMPLE_BYTES = 256 << 20
MAX_WORDS = 4_000_000
_COVERAGE = {"nmt_nfkc_cf": 0.999995, "nmt_nfkc": 0.999999}  # of the published 32k and 64k models
_LEAST_COVERAGE = 0.98  # that SentencePiece takes
_NUM_THREADS = 8  # sums depend on it, so it is fixed whatever the machine has


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """Read ``sp.model`` and ``dict.txt`` of a folder that a user named.

    Raises:
        UserError: one of them is missing, damaged, or does not belong to the other.
    """
    refuse_damage(folder, VOCABULARY_FILES)
    try:
        return Vocabulary.from_folder(folder)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def count_words(
    sources: list[TextSource], lower: bool, num_workers: int, progress: Progress
) -> Counter[str]:
    """Count the normalised words of a sample of the inputs.

    Raises:
        UserError: there is no text.
    """
    total, before = total_bytes(sources), bytes_before(sources)
    counts: Counter[str] = Counter()
    threshold = 1
    chunks = sample_chunks(sources)
    for chunk, part in map_in_order(WordCounter, (lower,), chunks, num_workers):
        progress.show("counting words", before[chunk.end.source] + chunk.bytes_on_disk, total)
        counts.update(part)
        while len(counts) > MAX_WORDS:  # drop the rarest
            counts = Counter({word: count for word, count in counts.items() if count > threshold})
            threshold += 1
    if not counts:
        raise UserError("no text in the input to train a vocabulary on")
    return counts


def sample_chunks(sources: list[TextSource]) -> Iterator[Chunk]:
    """Yield about ``SAMPLE_BYTES`` of chunks, spread evenly over the inputs, always the same ones.

    Inputs of unknown length are read from their beginning until that is enough.
    """
    total = total_bytes(sources)
    stride = 1 if total is None else max(1, -(-total // SAMPLE_BYTES))
    seen = 0
    for chunk in itertools.islice(read_chunks(sources), 0, None, stride):
        seen += (
            sum(map(len, chunk.payload)) if isinstance(chunk.payload, list) else len(chunk.payload)
        )
        yield chunk
        if total is None and seen >= SAMPLE_BYTES:
            return


def train_vocabulary(counts: Counter[str], size: int, lower: bool, folder: Path) -> None:
    """Write ``sp.model`` and ``dict.txt`` with ``size`` ids, the four special ones included.

    Raises:
        UserError: ``size`` does not fit the text; the message names one that does.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    rule = "nmt_nfkc_cf" if lower else "nmt_nfkc"
    # A fixed order; tabs cannot occur within a word.
    words = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in words),
            model_writer=model,
            input_format="tsv",
            model_type="unigram",
            vocab_size=size,
            normalization_rule_name=rule,
            character_coverage=_coverage(counts, size, _COVERAGE[rule]),
            max_sentence_length=10240,
            max_sentencepiece_length=32,
            bos_id=0, pad_id=1, eos_id=2, unk_id=3,
            bos_piece="[CLS]", pad_piece="[PAD]", eos_piece="[SEP]", unk_piece="[UNK]",
            user_defined_symbols=["[MASK]"],
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        if largest := re.search(r"value <= (\d+)", str(error)):
            remedy = f"the largest that this text allows is {largest[1]}"
        elif smallest := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            remedy = f"the smallest that this text allows is {smallest[1]}"
        else:
            remedy = f"SentencePiece: {error}"
        raise UserError(
            f"cannot train a vocabulary of {size} pieces on {len(counts)} distinct words: {remedy}"
        ) from None
    processor = SentencePieceProcessor(model_proto=model.getvalue())
    pieces = processor.id_to_piece(list(range(NUM_SPECIAL_IDS, processor.get_piece_size())))
    (folder / DICT_FILE).write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    (folder / SPM_FILE).write_bytes(model.getvalue())


def _coverage(counts: Counter[str], size: int, published: float) -> float:
    """Return the published character coverage, or less where it would fill half the vocabulary."""
    chars: Counter[str] = Counter()
    for word, count in counts.items():
        for char in word:
            chars[char] += count
    frequencies = sorted(chars.values(), reverse=True)
    total, covered = sum(frequencies), sum(frequencies[: size // 2])
    return max(_LEAST_COVERAGE, min(published, covered / max(total, 1)))
