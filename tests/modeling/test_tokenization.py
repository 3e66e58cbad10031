"""The Hugging Face tokenizer gives the ids, tokens and texts of the published one."""

import copy
import json
import pickle
from pathlib import Path

import pytest
from transformers import AddedToken, DataCollatorForSeq2Seq, PreTrainedTokenizer

from metro.data.text.corpus import prepare_text
from metro.modeling.text_metro_t5 import Vocabulary
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer

VOCABULARIES = {"32k": "vocab_32k", "64k": "vocab_64k"}


def load(folder: Path, **settings) -> MetroT5Tokenizer:
    return MetroT5Tokenizer(str(folder / "sp.model"), str(folder / "dict.txt"), **settings)


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer_and_recorded(request, golden, testdata):
    recorded = json.loads((golden / "hf_tokenizer.json").read_text(encoding="utf-8"))
    return load(testdata / "vocab" / VOCABULARIES[request.param]), recorded["tokenizers"][
        request.param
    ]


def assert_like_recorded(tokenizer, recorded):
    for item in recorded["items"]:
        text = item["text"]
        assert tokenizer(text)["input_ids"] == item["ids"], text
        assert tokenizer.encode(text, add_special_tokens=False) == item["ids_no_special"], text
        assert tokenizer.tokenize(text) == item["tokens"], text
        assert tokenizer.decode(item["ids"]) == item["decode"], text
        decoded = tokenizer.decode(item["ids"], skip_special_tokens=True)
        assert decoded == item["decode_skip_special"], text


def test_ids_tokens_and_decoded_text_equal_recorded_ones(tokenizer_and_recorded, tmp_path):
    """Oracle: the published tokenizer class under transformers 4.17; also saved and pickled."""
    tokenizer, recorded = tokenizer_and_recorded
    assert_like_recorded(tokenizer, recorded)
    assert_sizes_pairs_truncation_and_padding_like_recorded(tokenizer, recorded)
    tokenizer.save_pretrained(tmp_path)
    loaded = MetroT5Tokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # onto its own files
    assert_like_recorded(loaded, recorded)
    assert_like_recorded(pickle.loads(pickle.dumps(tokenizer)), recorded)


def assert_sizes_pairs_truncation_and_padding_like_recorded(tokenizer, recorded):
    """The texts of pair and truncation are read off the recorded ids."""
    assert (tokenizer.vocab_size, len(tokenizer)) == (recorded["vocab_size"], recorded["len"])
    ids = tokenizer.convert_tokens_to_ids
    assert (ids("<sen000>"), ids("<sen511>")) == (recorded["sen000"], recorded["sen511"])
    for name in ("bos", "eos", "pad", "unk", "cls", "sep"):
        assert getattr(tokenizer, f"{name}_token_id") == recorded[name]
    batch = tokenizer(recorded["batch_padding"]["texts"], padding=True)
    assert batch["input_ids"] == recorded["batch_padding"]["input_ids"]
    assert batch["attention_mask"] == recorded["batch_padding"]["attention_mask"]
    assert list(batch) == recorded["model_inputs"]
    first, second = recorded["pair"][1:3], recorded["pair"][5:7]
    assert recorded["pair"] == tokenizer.build_inputs_with_special_tokens(first, second)
    pair = tokenizer(
        tokenizer.decode(first), tokenizer.decode(second), return_special_tokens_mask=True
    )
    assert pair["input_ids"] == recorded["pair"]
    assert pair["special_tokens_mask"] == [1, 0, 0, 1, 1, 0, 0, 1]
    cut = tokenizer(tokenizer.decode(recorded["truncated_to_8"][1:-1]) + " and more" * 9,
                    truncation=True, max_length=8)  # fmt: skip
    assert cut["input_ids"] == recorded["truncated_to_8"]


A = 17
"""The id of `a` in the tiny vocabulary of 1,000 pieces, in the tests by hand below."""


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load(golden / "tiny_vocab")


def test_padding_on_either_side(golden, tokenizer):
    """Oracle: by hand."""
    batch = load(golden / "tiny_vocab", padding_side="left")(["a", "a a a"], padding=True)
    assert batch["input_ids"] == [[1, 1, 0, A, 2], [0, A, A, A, 2]]
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    batch = tokenizer(["a", "a a a"], padding="max_length", max_length=6, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, A, 2, 1, 1, 1], [0, A, A, A, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    batch = tokenizer(["a", "a a a"], padding=True, pad_to_multiple_of=8)
    assert [len(row) for row in batch["input_ids"]] == [8, 8]
    with_ids = tokenizer.pad({"input_ids": [[0, 2], [0, A, 2]]})
    assert with_ids["attention_mask"] == [[1, 1, 0], [1, 1, 1]]


def test_truncation_of_texts_and_pairs(golden, tokenizer):
    """Oracle: by hand; the special tokens stay, the longer text gives way."""
    [b], [c] = (tokenizer.encode(text, add_special_tokens=False) for text in "bc")
    cut = {"truncation": True, "max_length": 4}
    assert tokenizer("a b c", **cut)["input_ids"] == [0, A, b, 2]
    assert tokenizer(["a b c", "b"], **cut)["input_ids"] == [[0, A, b, 2], [0, b, 2]]
    left = load(golden / "tiny_vocab", truncation_side="left")
    assert left("a b c", **cut)["input_ids"] == [0, b, c, 2]
    texts = ("a a a a", "b c")
    assert tokenizer(*texts, truncation=True, max_length=8)["input_ids"] == [0, A, A, 2, 2, b, c, 2]
    first = tokenizer(*texts, truncation="only_first", max_length=7)["input_ids"]
    second = tokenizer(*texts, truncation="only_second", max_length=9)["input_ids"]
    assert first == [0, A, 2, 2, b, c, 2] and second == [0, A, A, A, A, 2, 2, b, 2]
    plain = tokenizer("a b c", add_special_tokens=False, truncation=True, max_length=2)
    assert plain["input_ids"] == [A, b]
    assert tokenizer("a b c")["input_ids"] == [0, A, b, c, 2]


def test_pairs_and_masks_of_special_tokens(tokenizer):
    """Oracle: by hand."""
    pairs = tokenizer([("a", "a a"), ("a a", "a")], return_special_tokens_mask=True)
    assert pairs["input_ids"] == [[0, A, 2, 2, A, A, 2], [0, A, A, 2, 2, A, 2]]
    assert pairs["special_tokens_mask"] == [[1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0, 1]]
    assert tokenizer(["a", "a a"], ["a a", "a"])["input_ids"] == pairs["input_ids"]
    assert "token_type_ids" not in pairs
    made = tokenizer("a", "a", return_token_type_ids=True)
    assert made["token_type_ids"] == [0] * 6
    single = tokenizer("a a", return_special_tokens_mask=True, return_length=True)
    assert single["special_tokens_mask"] == [1, 0, 0, 1]
    ids = [0, A, 3, 2, 1]
    mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert mask == [1, 0, 1, 1, 1]
    assert tokenizer.num_special_tokens_to_add() == 2
    assert tokenizer.num_special_tokens_to_add(pair=True) == 4


def test_a_target_is_what_the_decoder_is_trained_to_write(tokenizer):
    """Oracle: by hand; the targets of finetuning have no <s> and end with </s>."""
    both = tokenizer(["a", "a a"], text_target=["a a", "a"])
    assert both["input_ids"] == [[0, A, 2], [0, A, A, 2]] and both["labels"] == [[A, A, 2], [A, 2]]
    target = tokenizer(text_target="a a a", truncation=True, max_length=3)
    assert target["input_ids"] == [A, A, 2]
    masked = tokenizer(text_target="a", return_special_tokens_mask=True)
    assert masked["special_tokens_mask"] == [0, 1]
    with pytest.raises(ValueError, match="Input must be"):
        tokenizer(text_target=3.5)
    assert tokenizer("a")["input_ids"] == [0, A, 2]  # and so are inputs afterwards


def test_offsets_are_refused(tokenizer):
    """The normaliser moves characters: any offset would be made up."""
    with pytest.raises(NotImplementedError, match="return_offsets_mapping"):
        tokenizer("a", return_offsets_mapping=True)
    assert tokenizer(["a"], return_offsets_mapping=False)["input_ids"] == [[0, A, 2]]


def test_sentinels_are_entries_that_no_text_gives(tokenizer):
    """Oracle: training, where sentinels come from the corruption alone."""
    first = tokenizer.convert_tokens_to_ids("<sen000>")
    assert first == 1000 and tokenizer.convert_ids_to_tokens(first + 511) == "<sen511>"
    assert first not in tokenizer("<sen000>")["input_ids"]
    assert tokenizer.decode([0, A, first, A, 2]) == "<s> a<sen000> a</s>"
    assert tokenizer.decode([0, A, first, A, 2], skip_special_tokens=True) == "a a"
    written_out = tokenizer("a <sen000> a")["input_ids"]
    assert tokenizer.decode(written_out, skip_special_tokens=True) == "a < sen000 > a"
    assert tokenizer.convert_tokens_to_ids(["<sen001>", "▁a"]) == [first + 1, A]
    with pytest.raises(ValueError, match=f"id -100 is not one of the {len(tokenizer)}"):
        tokenizer.decode([0, -100])
    assert tokenizer.decode([0, A, len(tokenizer), A]) == "<s> a a"  # of a padded embedding


def test_added_tokens_keep_the_blanks_around_them(tokenizer):
    """Oracle: the texts; what stands without a blank is a word of its own, as in training."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["Größe", "[ENT]"])
    for text, back in (
        ("a Größe b", None),
        ("[ENT] a", None),
        ("a [ENT]", None),
        ("a [ENT] [ENT] b", None),
        ("a[ENT]b", "a [ENT] b"),
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == (back or text)
        assert tokenizer.unk_token_id not in ids


def test_a_vocabulary_from_elsewhere_with_bytes_and_symbols_survives(tmp_path):
    """Oracle: the texts, through SentencePiece's byte fallback and its user-defined symbols."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["the sea is blue and the ship is on the sea"] * 50),
        model_prefix=str(tmp_path / "sp"), vocab_size=300, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, bos_id=0, pad_id=1, eos_id=2, unk_id=3,
        user_defined_symbols=["[MASK]", "xyz"],
    )  # fmt: skip
    processor = SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    pieces = [processor.id_to_piece(i) for i in range(4, processor.get_piece_size())]
    (tmp_path / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces))
    tokenizer = load(tmp_path)
    for text in ("the sea", "das grün 海 🌊 is blue", "a xyz b", "xyz"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids


def test_sentinels_of_t5_are_no_entries_until_they_are_added(golden):
    tokenizer = load(golden / "tiny_vocab")
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == tokenizer.unk_token_id
    assert len(tokenizer("<extra_id_0>")["input_ids"]) > 3
    tokenizer.add_tokens([AddedToken("<extra_id_0>", special=True)])
    assert len(tokenizer) == 1513
    ids = tokenizer("a <extra_id_0> a zebra")["input_ids"]
    assert ids[:4] == [0, A, 1512, A] and ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a a zebra"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Hello, world. It's 5 o'clock.", "hello, world. it's 5 o'clock."),
        ("I don't know; we're late.", "i don't know ; we're late."),
        ("The quick brown fox.\nJumps.", "the quick brown fox. jumps."),
        ("e-mail to b.com", "e-mail to b.com"),
    ],
)
def test_decoded_text_reads_naturally(tokenizer, text, expected):
    """Oracle: the text itself, folded; blanks around brackets and colons are the splitter's."""
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected
    assert tokenizer.batch_decode([ids, ids], skip_special_tokens=True) == [expected] * 2
    assert tokenizer.decode(ids).startswith("<s>") and tokenizer.decode(ids).endswith("</s>")
    raw = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert raw.replace(" ", "") == expected.replace(" ", "")


class PlainWay(MetroT5Tokenizer):
    """The base class does everything: no way around strings of pieces."""

    def tokenize(self, text, **kwargs):
        pieces = PreTrainedTokenizer.tokenize(self, text, **kwargs)
        return [piece for piece in pieces if piece] or pieces  # nothing between added tokens

    _encode_plus = PreTrainedTokenizer._encode_plus
    convert_tokens_to_ids = PreTrainedTokenizer.convert_tokens_to_ids


ADDED = ["<extra_id_0>", "zebra", "ell", "▁h"]


@pytest.mark.parametrize("added", [[], ADDED], ids=["as released", "with added tokens"])
def test_the_fast_way_gives_what_the_base_class_gives(golden, added):
    """Oracle: the way of the base class, on the recorded strings and on what surrounds them."""
    folder = golden / "tiny_vocab"
    fast, plain = load(folder), PlainWay(str(folder / "sp.model"), str(folder / "dict.txt"))
    for tokenizer in (fast, plain):
        tokenizer.add_tokens(added)
    recorded = json.loads((golden / "hf_tokenizer.json").read_text(encoding="utf-8"))
    texts = [item["text"] for item in recorded["tokenizers"]["64k"]["items"]]
    texts += [f"{text}</s> {text}" for text in texts[:50]]
    texts += ["", " ", "<s>", "<", "<unk>hello<pad>"]
    texts += ["a zebra, hello <extra_id_0> ZEBRA", "<extra_id_0>", "▁hello"]
    options = {"truncation": True, "max_length": 12, "padding": True}
    assert dict(fast(texts)) == dict(plain(texts))
    assert dict(fast(texts, texts[::-1], **options)) == dict(plain(texts, texts[::-1], **options))
    for text in texts:
        assert fast.tokenize(text) == plain.tokenize(text), text
        assert fast(text)["input_ids"] == plain(text)["input_ids"], text
    words = [text.split() for text in texts if text.split()]
    split = {"is_split_into_words": True}
    assert fast(words, **split)["input_ids"] == plain(words, **split)["input_ids"]
    whole = {"split_special_tokens": True}
    assert fast(texts, **whole)["input_ids"] == plain(texts, **whole)["input_ids"]


def test_the_rust_library_differs_where_it_is_said_to(testdata):
    """Oracle: SentencePiece itself; the docstring of the tokenizer names the three cases."""
    from benchmarks.tokenizer import rust_rebuild

    folder = testdata / "vocab/vocab_32k"
    vocabulary, rust = Vocabulary.from_folder(folder), rust_rebuild(folder)

    def same(text):
        return vocabulary.processor.encode(text) == rust.encode(text, add_special_tokens=False).ids

    assert all(same(text) for text in ("the lobster is blue .", "\u00bd \ufb01 \u1e9e", "[mask]"))
    assert not any(same(text) for text in ("e\u0301\u0323", "zzaaaaaaa", "[MASK] x"))


def test_targets_and_the_collator_for_sequence_to_sequence(tokenizer):
    """Oracle: by hand; labels are padded with -100."""
    rows = [tokenizer(text, text_target=target) for text, target in (("a", "a a"), ("a a", "a"))]
    assert rows[0]["labels"] == [A, A, 2]
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[0, A, 2, 1], [0, A, A, 2]]
    assert batch["labels"].tolist() == [[A, A, 2], [A, 2, -100]]


def test_added_tokens_and_settings_survive_saving(golden, tmp_path):
    tokenizer = load(golden / "tiny_vocab", lower=False, n_sentinel_tokens=7, model_max_length=64)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path)
    loaded = MetroT5Tokenizer.from_pretrained(tmp_path)
    assert (loaded.lower, loaded.n_sentinel_tokens, loaded.model_max_length) == (False, 7, 64)
    assert len(loaded) == len(tokenizer) == 1000 + 7 + 1
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("a zebra A")["input_ids"] == tokenizer("a zebra A")["input_ids"]
    again = pickle.loads(pickle.dumps(loaded))
    assert again("a zebra A")["input_ids"] == tokenizer("a zebra A")["input_ids"]


def test_a_dataset_is_mapped_by_several_processes(tokenizer):
    """Oracle: one process."""
    datasets = pytest.importorskip("datasets")
    texts = [f"{i} lobsters, it's {'very ' * (i % 5)}late." for i in range(40)]
    rows = datasets.Dataset.from_dict({"text": texts})
    mapped = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=12),
        batched=True, num_proc=2, load_from_cache_file=False,
    )  # fmt: skip
    expected = tokenizer(texts, truncation=True, max_length=12)
    assert list(mapped["input_ids"]) == expected["input_ids"]


def test_vocabulary_files_of_two_folders_are_refused(golden, tmp_path):
    first, *lines = (golden / "tiny_vocab/dict.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "dict.txt").write_text("\n".join([first, *reversed(lines)]), encoding="utf-8")
    model = golden / "tiny_vocab/sp.model"
    with pytest.raises(ValueError, match="must be in one folder"):
        MetroT5Tokenizer(str(model), str(tmp_path / "dict.txt"))
    (tmp_path / "sp.model").write_bytes(model.read_bytes())
    with pytest.raises(ValueError, match="dict.txt and sp.model differ first at line"):
        MetroT5Tokenizer(str(tmp_path / "sp.model"), str(tmp_path / "dict.txt"))


def test_cased_text_keeps_its_capitals(text, tmp_path):
    (tmp_path / "text.txt").write_text("New York is big.\n" * 50 + text.read_text(encoding="utf-8"))
    made = prepare_text(
        inputs=[tmp_path / "text.txt"], out=tmp_path / "cased", train_vocab=150, cased=True,
        num_workers=1, progress=False,
    )  # fmt: skip
    tokenizer = load(made.folder, lower=False)
    assert tokenizer.decode(
        tokenizer("New York is big.")["input_ids"], skip_special_tokens=True
    ) == ("New York is big.")
