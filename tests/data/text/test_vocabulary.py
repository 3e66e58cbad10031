"""Trained vocabularies are laid out like the published ones, and fit their text."""

import pytest

from metro.modeling.text_metro_t5 import Vocabulary
from tests.data.prepared import files_of, prepare, random_text


@pytest.mark.parametrize("lower", [True, False])
def test_trained_vocabulary_has_the_published_layout_and_is_the_same_each_time(
    text, tmp_path, lower
):
    """Oracle: the layout of the published sp.model files."""
    for name, workers in (("a", 1), ("b", 2)):
        settings = {"train_vocab": 200, "cased": not lower, "num_workers": workers}
        prepare([text], tmp_path / name, None, **settings)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    vocabulary = Vocabulary.from_folder(tmp_path / "a")
    processor = vocabulary.processor
    assert len(vocabulary) == 200
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    assert processor.id_to_piece(list(range(5))) == special
    assert processor.encode("a[MASK]")[-1] == 4
    assert (vocabulary.encode("ÉTA", lower) == vocabulary.encode("éta", lower)) == lower


@pytest.mark.parametrize(
    "size, remedy",
    [(5000, r"the largest that this text allows is \d+"), (9, "the smallest .* allows is 14$")],
)
def test_vocabulary_size_that_does_not_fit_the_text_is_refused(tmp_path, size, remedy):
    (tmp_path / "small.txt").write_text("some few words\n")
    message = f"vocabulary of {size} pieces on 3 distinct words: {remedy}"
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / "small.txt"], tmp_path / "out", None, train_vocab=size)
    assert [path.name for path in tmp_path.iterdir()] == ["small.txt"]


def test_small_vocabulary_gives_up_rare_characters(tmp_path):
    """Oracle: a vocabulary of 60 ids cannot hold 300 characters, and is trained all the same."""
    rare = " ".join(chr(0x4E00 + number) for number in range(300))
    (tmp_path / "text.txt").write_text(random_text(6, 3000) + rare, encoding="utf-8")
    result, _ = prepare([tmp_path / "text.txt"], tmp_path / "out", None, train_vocab=60)
    assert result.manifest["counts"]["vocab_size"] == 60
    assert result.manifest["counts"]["unknown_tokens"] >= 250
