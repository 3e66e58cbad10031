"""The text normaliser and the vocabulary give the ids of the published models."""

import json
import random
import subprocess
import sys

import pytest

from benchmarks.plain_chain import normalize_plainly
from metro.modeling import text_metro_t5
from metro.modeling.text_metro_t5 import Vocabulary, normalize_text, read_dictionary

PASSES = {
    "vocab_32k": "vocab_32k",
    "vocab_64k": "vocab_64k",
    "vocab_64k_cased": "vocab_64k",
    "vocab_32k_nolower": "vocab_32k",
}


@pytest.fixture(scope="module")
def passes(golden) -> dict:
    return json.loads((golden / "tokenization.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PASSES)
def test_normalized_text_equals_the_originals(passes, name):
    """Oracle: the original's rule-based splitter, recorded."""
    for item in passes[name]["items"]:
        assert normalize_text(item["text"], passes[name]["lower"]) == item["guoke"], item["text"]


def test_pieces_and_ids_of_the_published_vocabularies_equal_the_originals(passes, testdata):
    """Oracles: sentencepiece 0.2.0 and fairseq's dictionary, recorded; the vocabularies' README."""
    for name, folder in PASSES.items():
        vocabulary = Vocabulary.from_folder(testdata / "vocab" / folder)
        is_cased = folder == "vocab_64k"
        assert (len(vocabulary), vocabulary.is_cased) == (64000 if is_cased else 32768, is_cased)
        for item in passes[name]["items"]:
            assert vocabulary.processor.encode(item["guoke"], out_type=str) == item["pieces"]
            assert vocabulary.encode(item["text"], passes[name]["lower"]) == item["ids"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(It's fine.)", "( It's fine .)"),
        ("''quoted'' and ``quoted''", '" quoted " and " quoted "'),
        ("don’t – “stop”", 'don\'t - " stop "'),
        ("state-of-the-art", "state-of-the-art"),
        ("...", "..."),
        ("HE ' S here", "HE 'S here"),
        ("they ' LL go", "they 'LL go"),
        (" a\tb\r\nc ", "a b c"),
    ],
)
def test_splitter_by_hand(text, expected):
    """Oracle: the rules, applied by hand."""
    assert normalize_text(text, lower=False) == expected


def test_remembered_splits_equal_plain_splitter_on_random_text(monkeypatch):
    """Oracle: a second implementation that looks at each character and remembers nothing."""
    monkeypatch.setattr(text_metro_t5._SplitTokens, "max_entries", 50)  # so that it overflows
    rng = random.Random(1)
    alphabet = list("'''\"`.,-([ \t  stmdlrevSTLLREVEabcΣσ1é’“”—–´¿。\u0301\u00a0\u200b_$x")
    for _ in range(20_000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(25)))
        lower = rng.random() < 0.5
        assert normalize_text(text, lower) == normalize_plainly(text, lower), repr(text)


def test_module_does_not_load_transformers():
    """Workers of data preparation import it, once each."""
    loaded = "{'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys, metro.data.text.corpus; assert not {loaded}, 1"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines[:4] + ["wrong 1"] + lines[5:], "line 5 of dict.txt: 'wrong'"),
        (lambda lines: lines[:-2], "994 lines .* at line 995"),
        (lambda lines: lines + ["extra 1"], "997 lines .* at line 997"),
        (lambda lines: lines[:6] + ["nocount"] + lines[7:], "line 7: expected `piece count`"),
    ],
)
def test_dictionary_that_does_not_match_is_refused(golden, tmp_path, change, message):
    source = golden / "tiny_vocab"
    lines = (source / "dict.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    (tmp_path / "dict.txt").write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    (tmp_path / "sp.model").write_bytes((source / "sp.model").read_bytes())
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_folder(tmp_path)


def test_missing_and_broken_vocabulary_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sp.model"):
        Vocabulary.from_folder(tmp_path)
    (tmp_path / "sp.model").write_bytes(b"not a model")
    with pytest.raises(FileNotFoundError, match="no dict.txt"):
        Vocabulary.from_folder(tmp_path)
    (tmp_path / "dict.txt").write_text("a 1\n")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Vocabulary.from_folder(tmp_path)


def test_dictionary_keeps_symbols_that_look_like_line_breaks(tmp_path):
    (tmp_path / "dict.txt").write_bytes("a\u0085b 1\n▁ 7\n".encode())
    assert read_dictionary(tmp_path / "dict.txt") == ["a\u0085b", "▁"]
