"""What is encoded under each objective, and how wrong labels are drawn: by hand, by counting."""

from collections import Counter

import pytest

from metro.data.prompts.encoding import PromptEncoder
from metro.finetuning.collation import EncodedPrompt
from metro.finetuning.objectives import Unusable, encode_example, gold_and_others
from metro.utils.seeds import draws

EXAMPLE = {
    "task": "t",
    "row": 3,
    "input": "it rains. Is it wet?",
    "target": "Yes",
    "answer_choices": ["No", "Yes", "Maybe"],
    "label": 1,
    "flipped_input": "it rains.<extra_id_0>",
    "instruction": "<extra_id_0>  Is it wet?",
}


class Words(PromptEncoder):
    """An encoder whose tokens are words, numbered as they occur."""

    max_target_length = 99

    def __init__(self):
        self.words: list[str] = []

    def sources(self, texts):
        for word in " ".join(texts).split():
            if word not in self.words:
                self.words.append(word)
        return [[self.words.index(word) for word in text.split()] for text in texts]

    labelled_sources = targets = sources

    def text(self, ids) -> str | None:
        return None if ids is None else " ".join(self.words[i] for i in ids)


def texts(objective, draw=0, **changes) -> EncodedPrompt:
    """EXAMPLE encoded, with the words of the ids."""
    words = Words()
    encoded = encode_example({**EXAMPLE, **changes}, 7, objective, words, draw)
    return EncodedPrompt(7, *(words.text(ids) for ids in encoded[1:5]), encoded.num_skipped)


PROMPT, INPUT = EXAMPLE["input"], "input: it rains.<extra_id_0> output:"


@pytest.mark.parametrize(
    ("objective", "source", "target", "wrong_source", "wrong_target"),
    [
        ("direct", PROMPT, "No", None, None),
        ("channel", "No", PROMPT, None, None),
        ("flipped", f"{INPUT} No", "<extra_id_0> Is it wet?", f"{INPUT} Yes", None),
        ("direct+ul", PROMPT, "No", None, "Yes"),
    ],
)
def test_what_is_read_and_written(objective, source, target, wrong_source, wrong_target):
    encoded = texts(objective, label=0, answer_choices=["No", "Yes"], target="No")
    assert (encoded.source_ids, encoded.target_ids) == (source, target)
    assert (encoded.wrong_source_ids, encoded.wrong_target_ids) == (wrong_source, wrong_target)


def test_wrong_labels_are_uniform_over_the_other_answer_choices():
    """3,000 draws of two answer choices: 1,500 +- 4 standard deviations."""
    wrong = Counter(
        texts("flipped", int(draws(1, epoch))).wrong_source_ids for epoch in range(3000)
    )
    assert {text.split()[-1] for text in wrong} == {"No", "Maybe"}
    assert all(abs(count - 1500) < 4 * 3000**0.5 / 2 for count in wrong.values())


def test_a_wrong_label_never_reads_as_the_gold_one():
    """Answer choices given twice, as in 6 of 400 rows of cos_e."""
    example = {"answer_choices": ["a", "b", "b", "a", "c"], "label": 0}
    assert gold_and_others(example) == ("a", ["b", "c"])


def test_answer_choices_with_identical_ids_are_skipped():
    """The words of "Yes" and "Yes " are the same: the wrong label is the third answer choice."""
    for epoch in range(20):
        encoded = texts("flipped", epoch, answer_choices=["Yes ", "Yes", "No"])
        assert encoded.wrong_source_ids.endswith("output: No")
    with pytest.raises(Unusable, match="identical ids"):
        texts("direct+ul", answer_choices=["Yes ", "Yes"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer_choices": None}, "no answer choices"),
        ({"label": None}, "no answer choices"),
        ({"answer_choices": ["Yes"], "label": 0}, "a single answer choice"),
        ({"answer_choices": ["Yes", "Yes"], "label": 0}, "a single answer choice"),
        ({"flipped_input": None, "instruction": None}, "no instruction"),
        ({"instruction": "<extra_id_0>  <extra_id_1> \n"}, "instruction without text"),
        ({"answer_choices": ["Yes", "No \ud83d"]}, "half a character"),
        ({"target": None}, "no text 'target'"),
    ],
)
def test_examples_without_use_are_refused(changes, reason):
    with pytest.raises(Unusable, match=reason):
        texts("flipped", **changes)
