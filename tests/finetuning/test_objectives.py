"""What is encoded under each objective, and how wrong labels are drawn: by hand, by counting."""

from collections import Counter

import numpy as np
import pytest

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


class Words:
    """A stand-in for the encoder whose ids are the words themselves."""

    max_target_length = 99

    def sources(self, texts):
        return [text.split() for text in texts]

    labelled_sources = targets = sources


@pytest.fixture
def texts(monkeypatch):
    """encode_example with words instead of ids."""
    monkeypatch.setattr("numpy.array", lambda values, dtype=None: " ".join(values))
    return lambda objective, draw=0, **changes: encode_example(
        {**EXAMPLE, **changes}, 7, objective, Words(), draw
    )


def test_direct_reads_the_prompt_and_writes_the_answer(texts):
    encoded = texts("direct")
    assert (encoded.source_ids, encoded.target_ids) == ("it rains. Is it wet?", "Yes")
    assert (encoded.index, encoded.wrong_ids) == (7, None)


def test_channel_reads_the_answer_and_writes_the_prompt(texts):
    encoded = texts("channel")
    assert (encoded.source_ids, encoded.target_ids) == ("Yes", "it rains. Is it wet?")


def test_flipped_reads_input_and_label_and_writes_the_instruction(texts):
    encoded = texts("flipped", label=0, answer_choices=["No", "Yes"])
    assert encoded.source_ids == "input: it rains.<extra_id_0> output: No"
    assert encoded.wrong_ids == "input: it rains.<extra_id_0> output: Yes"
    assert encoded.target_ids == "<extra_id_0> Is it wet?"


def test_direct_unlikelihood_has_a_wrong_answer(texts):
    encoded = texts("direct+ul", label=0, answer_choices=["No", "Yes"], target="No")
    assert encoded.source_ids == "it rains. Is it wet?"
    assert (encoded.target_ids, encoded.wrong_ids) == ("No", "Yes")


def test_wrong_labels_are_uniform_over_the_other_options(texts):
    """3,000 draws of two options: 1,500 +- 4 standard deviations."""
    wrong = Counter(texts("flipped", int(draws(1, epoch))).wrong_ids for epoch in range(3000))
    assert {text.split()[-1] for text in wrong} == {"No", "Maybe"}
    assert all(abs(count - 1500) < 4 * 3000**0.5 / 2 for count in wrong.values())


def test_a_wrong_label_never_reads_as_the_gold_one():
    """Options given twice, as in 6 of 400 rows of cos_e."""
    example = {"answer_choices": ["a", "b", "b", "a", "c"], "label": 0}
    assert gold_and_others(example) == ("a", ["b", "c"])


def test_options_that_encode_alike_are_passed_over(texts):
    """The words of "Yes" and "Yes " are the same: the wrong label is the third option."""
    for epoch in range(20):
        encoded = texts("flipped", epoch, answer_choices=["Yes ", "Yes", "No"])
        assert encoded.wrong_ids.endswith("output: No")
    with pytest.raises(Unusable, match="encode alike"):
        texts("direct+ul", answer_choices=["Yes ", "Yes"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer_choices": None}, "no options"),
        ({"label": None}, "no options"),
        ({"answer_choices": ["Yes"], "label": 0}, "a single option"),
        ({"answer_choices": ["Yes", "Yes"], "label": 0}, "a single option"),
        ({"flipped_input": None, "instruction": None}, "no instruction"),
        ({"instruction": "<extra_id_0>  <extra_id_1> \n"}, "instruction without text"),
    ],
)
def test_examples_without_use_are_refused(texts, changes, reason):
    with pytest.raises(Unusable, match=reason):
        texts("flipped", **changes)


def test_draws_are_uniform_and_independent_of_shape():
    """Chi-square of 16 bins over 64,000 draws: below 37.7 with probability 0.999."""
    rows = np.arange(64_000)
    together = draws(5, 2, 1, rows)
    assert [int(x) for x in together[:3]] == [int(draws(5, 2, 1, row)) for row in range(3)]
    counts = np.bincount((together % np.uint64(16)).astype(int), minlength=16)
    assert ((counts - 4000) ** 2 / 4000).sum() < 37.7
    assert len(set(together.tolist())) == len(rows)
