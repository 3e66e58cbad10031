"""The Hugging Face tokenizer gives the ids, tokens and texts of the published one."""

import json
import pickle

import pytest

from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer

VOCABULARIES = {"32k": "vocab_32k", "64k": "vocab_64k"}


def load(testdata, name, **settings) -> MetroT5Tokenizer:
    folder = testdata / "vocab" / VOCABULARIES[name]
    return MetroT5Tokenizer(str(folder / "sp.model"), str(folder / "dict.txt"), **settings)


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer_and_recorded(request, testdata):
    recorded = json.loads((testdata / "golden/hf_tokenizer.json").read_text(encoding="utf-8"))
    return load(testdata, request.param), recorded["tokenizers"][request.param]


def assert_like_recorded(tokenizer, recorded):
    for item in recorded["items"]:
        text = item["text"]
        assert tokenizer(text)["input_ids"] == item["ids"], text
        assert tokenizer.encode(text, add_special_tokens=False) == item["ids_no_special"], text
        assert tokenizer.tokenize(text) == item["tokens"], text
        assert tokenizer.decode(item["ids"]) == item["decode"], text
        decoded = tokenizer.decode(item["ids"], skip_special_tokens=True)
        assert decoded == item["decode_skip_special"], text


def test_ids_tokens_and_decoded_text_equal_recorded_ones(tokenizer_and_recorded):
    """Oracle: the published tokenizer class under transformers 4.17, recorded."""
    assert_like_recorded(*tokenizer_and_recorded)


def test_saved_and_pickled_tokenizers_are_the_same(tokenizer_and_recorded, tmp_path):
    tokenizer, recorded = tokenizer_and_recorded
    tokenizer.save_pretrained(tmp_path)
    loaded = MetroT5Tokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # onto its own files
    assert_like_recorded(loaded, recorded)
    assert_like_recorded(pickle.loads(pickle.dumps(tokenizer)), recorded)


def test_sizes_pairs_truncation_and_padding_equal_recorded_ones(tokenizer_and_recorded):
    """Oracle: as above; the texts of pair and truncation are read off the recorded ids."""
    tokenizer, recorded = tokenizer_and_recorded
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


def test_padding_on_the_left(testdata):
    tokenizer = load(testdata, "32k", padding_side="left")
    batch = tokenizer(["a", "a a a"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[1, 1, 0, 10, 2], [0, 10, 10, 10, 2]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_cased_text_keeps_its_capitals(testdata):
    tokenizer = load(testdata, "64k", lower=False)
    assert tokenizer.decode(
        tokenizer("New York is big.")["input_ids"], skip_special_tokens=True
    ) == ("New York is big.")


def test_released_tokenizer_files_load(testdata):
    """Oracle: the folders that the published converter wrote."""
    folder = testdata / "golden/hf_export/metro_tiny_b"
    tokenizer = MetroT5Tokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.lower, tokenizer.n_sentinel_tokens) == (1128, True, 128)
    assert tokenizer.convert_ids_to_tokens(1000) == "<sen000>"
