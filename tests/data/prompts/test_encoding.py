"""Prompted text to ids.

Oracle: a tokenizer's own ids.
"""

import pytest

from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.instruction import encoder_text


@pytest.fixture(scope="module")
def tokenizer(golden):
    from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer

    folder = golden / "tiny_vocab"
    return MetroT5Tokenizer(folder / "sp.model", folder / "dict.txt", n_sentinel_tokens=128)


def test_metro_encodes_a_sentinel_as_one_id_and_other_text_as_its_tokenizer(tokenizer):
    """Oracle: the tokenizer's ids of the pieces; <sen000> is 1000 in this vocabulary."""
    encoder = PromptEncoder(tokenizer)
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    text = "it is<extra_id_0>so<extra_id_1>\n output: yes"
    expected = [*plain("it is"), 1001, *plain("so"), 1002, *plain("output: yes")]
    assert encoder.sources([text, "so"]) == [[0, *expected, 2], [0, *plain("so"), 2]]
    assert encoder.targets(["<extra_id_0>  <extra_id_1> so"]) == [[1001, 1002, *plain("so"), 2]]
    with pytest.raises(ValueError, match="<extra_id_127> is in the text.*has 127 sentinels"):
        encoder.sources(["so<extra_id_127>"])


def test_long_labelled_sources_lose_input_not_their_label(tokenizer):
    """Oracle: the ids of the label alone at the end, the limit kept."""
    encoder = PromptEncoder(tokenizer, max_source_length=20)
    label = tokenizer("output: no", add_special_tokens=False)["input_ids"]
    long, short = encoder.labelled_sources(
        [encoder_text("so " * 90 + "<extra_id_0>", "no"), encoder_text("so", "no")]
    )
    assert len(long) == 20
    assert long[-1 - len(label) :] == [*label, 2]
    assert short == encoder.sources([encoder_text("so", "no")])[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_sources_are_cut_on_the_side_asked_for_and_counted(tokenizer, side):
    """Oracle: slices of the tokenizer's own ids."""
    encoder = PromptEncoder(tokenizer, max_source_length=10, truncation_side=side)
    texts = ["one after the other and so it goes on and on to the end", "so"]
    long, short = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = long[:8] if side == "right" else long[-8:]
    assert encoder.sources(texts) == [[0, *kept, 2], [0, *short, 2]]
    assert (encoder.num_cut_sources, encoder.num_cut_targets) == (1, 0)
    label = tokenizer("output: no", add_special_tokens=False)["input_ids"]
    [ids] = encoder.labelled_sources([encoder_text(texts[0], "no")])
    assert len(ids) == 10 and ids[-1 - len(label) :] == [*label, 2]
    start = tokenizer("input:", add_special_tokens=False)["input_ids"]
    assert (ids[1 : 1 + len(start)] == start) == (side == "right" and len(label) + len(start) <= 8)
    assert encoder.num_cut_sources == 2


def test_lengths_are_kept_and_checked(tokenizer):
    """Oracle: counting."""
    encoder = PromptEncoder(tokenizer, max_source_length=10, max_target_length=5)
    assert len(encoder.sources(["so " * 50])[0]) == 10
    target = encoder.targets(["so " * 50])[0]
    assert (len(target), target[-1]) == (5, 2)
    with pytest.raises(ValueError, match="max_target_length is 1"):
        PromptEncoder(tokenizer, max_target_length=1)
