"""From text to ids as METRO-T0 was trained: rule-based splitter, SentencePiece, ``dict.txt``.

The splitter sets punctuation at the two ends of a word apart and puts contractions together again:
``(It's fine.)`` becomes ``( it's fine .)``. It runs before SentencePiece, on every text that a
model ever sees. Needs the standard library alone, and ``sentencepiece`` where a vocabulary is
loaded.

Ids: 0 ``<s>``, 1 ``<pad>``, 2 ``</s>``, 3 ``<unk>``, then line n of ``dict.txt`` is id n + 3. These
are SentencePiece's own ids, which :meth:`Vocabulary.from_folder` verifies piece by piece.
"""

import hashlib
import re
import string
import unicodedata
from collections.abc import Iterable
from pathlib import Path

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
NUM_SPECIAL_IDS = 4
SPM_FILE, DICT_FILE = "sp.model", "dict.txt"
VOCABULARY_FILES = (SPM_FILE, DICT_FILE)

_PLAIN_FORMS = (("‘", "'"), ("’", "'"), ("´", "'"), ("“", '"'), ("”", '"'), ("—", "-"), ("–", "-"))
_CONTRACTIONS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"' ([smdSMDtT])\b", r"'\1"),
        (r"' ll\b", "'ll"),
        (r"' re\b", "'re"),
        (r"' ve\b", "'ve"),
        (r"' LL\b", "'LL "),
        (r"' RE\b", "'RE "),
        (r"' VE\b", "'VE "),
    )
)
_ANY_CONTRACTION = re.compile(r"' (?:[smdSMDtT]|ll|re|ve|LL|RE|VE)\b")


def is_punctuation(char: str) -> bool:
    """Check for ASCII symbols but letters, digits and blanks, and for Unicode category P."""
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def split_punctuation(token: str) -> str:
    """Set the punctuation at the start and at the end of one blank-free token apart by blanks.

    A token of one character, or of punctuation alone, stays whole; so does punctuation between
    letters.
    """
    if len(token) < 2 or token.isalnum():
        return token
    start, end = 0, len(token)
    while start < end and is_punctuation(token[start]):
        start += 1
    if start == end:
        return token
    while is_punctuation(token[end - 1]):
        end -= 1
    return " ".join(part for part in (token[:start], token[start:end], token[end:]) if part)


class _SplitTokens(dict):
    """Remembers ``split_punctuation`` per token, as texts repeat their words. Bounded."""

    max_entries = 1 << 17
    max_token_length = 64

    def __missing__(self, token: str) -> str:
        split = split_punctuation(token)
        if len(token) <= self.max_token_length:
            if len(self) >= self.max_entries:
                self.clear()
            self[token] = split
        return split


_split_tokens = _SplitTokens()


def normalize_text(text: str, lower: bool) -> str:
    """Split ``text`` into words and punctuation as METRO-T0 does: one line, single blanks.

    Args:
        text: any text; line breaks count as blanks.
        lower: fold to lower case at the end (the uncased models).
    """
    text = text.replace("``", '"').replace("''", '"')
    if not text.isascii():
        for char, plain in _PLAIN_FORMS:
            text = text.replace(char, plain)
    text = " ".join(map(_split_tokens.__getitem__, text.split()))
    if "' " in text and _ANY_CONTRACTION.search(text):
        for pattern, replacement in _CONTRACTIONS:
            text = pattern.sub(replacement, text)
        text = " ".join(text.split())
    return text.lower() if lower else text


class Vocabulary:
    """A SentencePiece model whose ids are known to be those of ``dict.txt``.

    Attributes:
        processor: the ``sentencepiece.SentencePieceProcessor``.
        folder: with ``sp.model`` and ``dict.txt``.
    """

    def __init__(self, processor, folder: Path):
        self.processor, self.folder = processor, folder

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Vocabulary":
        """Load ``sp.model`` and ``dict.txt``, and verify that their ids agree.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: ``sp.model`` is not a SentencePiece model, or the two files disagree.
        """
        from sentencepiece import SentencePieceProcessor

        folder = Path(folder)
        for name in VOCABULARY_FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: a vocabulary folder holds sp.model and dict.txt "
                    "(train one with `metro prepare-text --train-vocab N`)"
                )
        try:
            processor = SentencePieceProcessor(model_file=str(folder / SPM_FILE))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{folder / SPM_FILE} is not a SentencePiece model: {error}") from None
        _check_same_pieces(processor, folder)
        return cls(processor, folder)

    def __len__(self) -> int:
        """Ids with the four special ones, without the sentinels that the models add."""
        return self.processor.get_piece_size()

    @property
    def is_cased(self) -> bool:
        """True where pieces hold capitals (ASCII ones, which every English corpus has)."""
        pieces = self.processor.id_to_piece(list(range(NUM_SPECIAL_IDS + 1, len(self))))
        return any(re.search("[A-Z]", piece) for piece in pieces)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the two files."""
        return {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            for name in VOCABULARY_FILES
        }

    def encode_texts(self, texts: Iterable[str], lower: bool) -> list[list[int]]:
        """Ids of raw texts, normalised first, ``</s>`` at the end of each, as fairseq stores them.

        Runs on the calling thread alone.
        """
        lines = [normalize_text(text, lower) for text in texts]
        items = self.processor.encode(lines, out_type=int, num_threads=1)
        for item in items:
            item.append(EOS_ID)
        return items

    def encode(self, text: str, lower: bool) -> list[int]:
        """Ids of one raw text, see ``encode_texts``."""
        return self.encode_texts([text], lower)[0]


def read_dictionary(path: str | Path) -> list[str]:
    """The symbols of a fairseq ``dict.txt`` (``symbol count`` per line), in the order of their ids.

    Raises:
        ValueError: a line is not of that form, or the file is not UTF-8.
    """
    symbols = []
    try:
        # "\n" only: some symbols are characters at which str.splitlines would split.
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        symbol, _, count = line.rstrip().removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not symbol or not count.isdigit():
            raise ValueError(f"{path}, line {number}: expected `piece count`, found {line!r}")
        symbols.append(symbol)
    return symbols


def _check_same_pieces(processor, folder: Path) -> None:
    """Raise unless line n of dict.txt is piece n + 3 of sp.model, for all n."""
    remedy = (
        "take sp.model and dict.txt from the same source, or write dict.txt from sp.model: "
        "one `piece 1` per line, starting at piece 4"
    )
    special = [processor.bos_id(), processor.pad_id(), processor.eos_id(), processor.unk_id()]
    if special != [BOS_ID, PAD_ID, EOS_ID, UNK_ID]:
        raise ValueError(
            f"{folder / SPM_FILE} numbers begin, padding, end and unknown as {special}, and "
            "METRO needs [0, 1, 2, 3]: train the vocabulary with `metro prepare-text "
            "--train-vocab N`"
        )
    symbols = read_dictionary(folder / DICT_FILE)
    num_pieces = processor.get_piece_size()
    pieces = processor.id_to_piece(list(range(NUM_SPECIAL_IDS, num_pieces)))
    for number, (symbol, piece) in enumerate(zip(symbols, pieces, strict=False), start=1):
        if symbol != piece:
            raise ValueError(
                f"{folder}: dict.txt and sp.model differ first at line {number} of dict.txt: "
                f"{symbol!r} there, {piece!r} as piece {number + 3} of sp.model; {remedy}"
            )
    if len(symbols) != len(pieces):
        raise ValueError(
            f"{folder}: dict.txt has {len(symbols)} lines and sp.model {len(pieces)} pieces "
            "after the special ones, so they differ first at line "
            f"{min(len(symbols), len(pieces)) + 1}; {remedy}"
        )
