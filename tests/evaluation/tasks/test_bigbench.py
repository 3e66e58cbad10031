"""BIG-bench tasks in FLIPPED's formats.

Oracle: strings recorded from the original, up to five examples of each task.
"""

import json

import pytest

from metro.data.datasets import DatasetUnavailable
from metro.data.prompts.instruction import encoder_text
from metro.evaluation.tasks.bigbench import make_question, parse_task, read_task_file


def test_formats_equal_the_originals(golden):
    """Oracle: the recorded strings of all three methods."""
    path = golden / "flipped/bigbench_formats.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["task"] for record in records}) > 10
    for record in records:
        task = parse_task({**record["task_fields"], "examples": [record["example"]]})
        example = make_question(task, 0, 0, flipped=True)
        encoders = [encoder_text(example.flipped_input, c) for c in example.choices]
        assert encoders == record["flipped_encoders"]
        assert example.instruction == record["flipped_target"]
        assert example.input == record["direct_input"] == record["channel_target"]
        assert example.choices == record["direct_options"] == record["channel_inputs"]
        assert example.label == record["gold_index"]
        assert example.choices[example.label] == record["direct_target"]


def test_all_local_tasks_are_read(testdata):
    """Oracle: counts of the files' own examples; rebuilt ones in other forms are read as well."""
    root = testdata / "data" / "bigbench"
    assert len(read_task_file(root / "strategyqa").examples) == 2290
    assert len(read_task_file(root / "language_identification").examples) == 2000
    fallacies = read_task_file(root / "formal_fallacies_syllogisms_negation")
    assert len(fallacies.examples) == 250
    assert list(fallacies.examples[0]["target_scores"]) == ["valid", "invalid"]
    assert "Options:" not in fallacies.examples[0]["input"]


@pytest.mark.parametrize(
    ("examples", "choices", "label"),
    [
        ([("Which?\nOptions:\n(A) red one\n(B) green one", "(B)")], ["red one", "green one"], 1),
        ([("Which?\nOptions:\n(A) 1\n(B) 2", "1")], ["1", "2"], 0),
        ([("So?\nOptions:\n- Yes\n- No", "No")], ["Yes", "No"], 1),
        ([("True and False is", "False"), ("not True is", "False"), ("True is", "True")],
         ["False", "True"], 0),
    ],
)  # fmt: skip
def test_choices_of_big_bench_hard_are_read(examples, choices, label):
    """Oracle: by hand, the forms of its files: lettered, listed, and none for two answers."""
    content = {"canary": "", "examples": [{"input": i, "target": t} for i, t in examples]}
    question = make_question(parse_task(content), 0, 0)
    assert (question.choices, question.label) == (choices, label)
    assert "Options" not in question.input


def test_tasks_that_cannot_be_ranked_are_refused(tmp_path):
    """Oracle: the message names file and reason."""
    with pytest.raises(DatasetUnavailable, match="--bigbench-dir DIR"):
        read_task_file(tmp_path / "nothing")
    with pytest.raises(ValueError, match="example 1 has no multiple-choice targets"):
        good = {"input": "a", "target_scores": {"x": 1, "y": 0}}
        parse_task({"examples": [good, {"input": "b", "target": "free text"}]})
    with pytest.raises(ValueError, match="no multiple-choice targets"):
        parse_task({"examples": [{"input": "a", "target_scores": {"x": 0, "y": 0}}]})
    with pytest.raises(ValueError, match="choices that are not empty"):
        parse_task({"examples": [{"input": "a", "target_scores": {"": 1, "y": 0}}]})
    with pytest.raises(ValueError, match="task.json: example 1 has no 'input'"):
        parse_task({"examples": [good, {"target_scores": {"x": 1, "y": 0}}]})
    with pytest.raises(ValueError, match="has no examples; a task with subtasks"):
        parse_task({"name": "parent", "examples": []})
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(ValueError, match="task.json is not JSON"):
        read_task_file(tmp_path)
