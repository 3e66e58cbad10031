"""Label words replaced.

Oracle: strings recorded from the original, 25 rows of five (dataset, template) pairs.
"""

import json

import pytest

from metro.data.jsonl_rows import UnusableRow
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.label_generalization import replace_label_words

YES_NO = {"Yes": "Agree", "No": "Disagree"}


def test_published_replacement_equals_the_original(golden):
    """Oracle: the recorded strings before and after."""
    path = golden / "flipped/label_generalization.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 25
    for record in records:
        before, after = record["before"], record["after"]
        words = dict(zip(before["options"], after["options"], strict=True))
        text, options, label = (before[key] for key in ("direct_input", "options", "gold_index"))
        example = EvaluationExample(0, text, options, label, "", before["flipped_target"])
        changed = replace_label_words(example, words, "published")
        assert changed.instruction == after["flipped_target"]
        assert changed.choices == after["options"]
        assert changed.input == after["direct_input"]
        assert set(after["channel_targets"]) == {changed.input}
        assert changed.label == after["gold_index"]


def test_whole_words_keep_everything_else():
    """Oracle: by hand. "not" and the first sentence stay, and so does the white space."""
    text = "Yes, he said.\nNot so.  Is it not noted? Yes or no?"
    example = EvaluationExample(0, text, ["No", "Yes"], 0, "x", "<extra_id_0> No?<extra_id_1> Yes?")
    changed = replace_label_words(example, YES_NO)
    assert changed.input == "Yes, he said.\nNot so.  Is it not noted? Agree or disagree?"
    assert changed.instruction == "<extra_id_0> No?<extra_id_1> Agree?"
    assert changed.choices == ["Disagree", "Agree"]
    swapped = replace_label_words(example, {"Yes": "No", "No": "Yes"})
    assert swapped.input.endswith("No or yes?")  # replaced once, not back again


def test_original_words_and_unknown_options():
    """Oracle: nothing changes; the message names the option."""
    example = EvaluationExample(7, "Yes or no?", ["Yes", "Maybe"], 0)
    assert replace_label_words(example, YES_NO, "original") is example
    with pytest.raises(UnusableRow, match="without substitute: 'Maybe'; the suite replaces Yes"):
        replace_label_words(example, YES_NO)
