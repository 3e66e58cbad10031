"""BIG-bench tasks in FLIPPED's formats.

Oracle: strings recorded from the original, up to five examples of each task.
"""

import json
from collections import Counter

import pytest

from metro.data.datasets import DatasetUnavailable
from metro.data.prompts.instruction import encoder_text
from metro.evaluation.tasks.bigbench import make_question, parse_task, read_task_file
from metro.evaluation.tasks.loading import load_task
from metro.evaluation.tasks.suites import WHOLE_TASK, TaskSpec
from metro.evaluation.tasks.task import Sources

GOOD = {"input": "a", "target_scores": {"x": 1, "y": 0}}


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
        ([("Which?\nOptions:\n(A) red\nor not\n(B) green", "(A)")], ["red\nor not", "green"], 0),
    ],
)  # fmt: skip
def test_choices_of_big_bench_hard_are_read(examples, choices, label):
    """Oracle: by hand, the forms of its files: lettered, listed, and none for two answers."""
    content = {"canary": "", "examples": [{"input": i, "target": t} for i, t in examples]}
    question = make_question(parse_task(content), 0, 0)
    assert (question.choices, question.label) == (choices, label)
    assert "Options" not in question.input


def test_examples_without_a_question_are_left_out_alone(tmp_path):
    """Oracle: by hand, one example for each reason among two good ones; as JSON and as lines."""
    bad = {
        "no multiple-choice targets": {"input": "b", "target": "free text"},
        "no label": {"input": "a", "target_scores": {"x": 0, "y": 0}},
        "empty answer choice": {"input": "a", "target_scores": {"": 1, "y": 0}},
        "missing field": {"input": ["a"], "target_scores": {"x": 1, "y": 0}},
        "empty input": {**GOOD, "input": " "},
        "answer not among the choices": {"input": "b\nOptions:\n(A) x\n(B) y", "target": "(C)"},
        "a single answer choice": {"input": "a", "target_scores": {"x": 1}},
        "text with half a character (lone surrogate)": {**GOOD, "input": "\ud83d"},
    }
    examples = [GOOD, *bad.values(), GOOD]
    for name in ("whole", "lines"):
        (tmp_path / name).mkdir()
    (tmp_path / "whole/task.json").write_text(json.dumps({"examples": [*examples, 3]}))
    lines = [json.dumps(example) for example in examples]
    (tmp_path / "lines/all.jsonl").write_text("\n".join([*lines, "{not json"]))
    for name, last in (("whole", "no multiple-choice targets"), ("lines", "unreadable row")):
        task = load_task(TaskSpec(name, "bigbench", (WHOLE_TASK,)), Sources(bigbench_dir=tmp_path))
        found = task.examples(WHOLE_TASK)
        assert [example.index for example in found.examples] == [0, 9]
        counts = {reason: left.num_rows for reason, left in found.skipped.items()}
        assert counts == Counter([*bad, last]), name


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_damaged_answers_of_big_bench_hard_cost_themselves_alone(tmp_path, kind):
    """Oracle: by hand; two examples of 22 are damaged, and the others have two answers."""
    targets = ["Yes"] * 11 + ["Yep", None] + ["No"] * 9
    examples = [{"input": f"{n}?", "target": target} for n, target in enumerate(targets)]
    lines = [json.dumps(example) for example in examples]
    lines[12] = lines[12][:-5]
    whole = json.dumps({"examples": examples})
    (tmp_path / "hard").mkdir()
    (tmp_path / f"hard/all.{kind}").write_text(whole if kind == "json" else "\n".join(lines))
    task = load_task(TaskSpec("hard", "bigbench", (WHOLE_TASK,)), Sources(bigbench_dir=tmp_path))
    found = task.examples(WHOLE_TASK)
    assert [example.index for example in found.examples] == [*range(11), *range(13, 22)]
    assert {tuple(example.choices) for example in found.examples} == {("No", "Yes")}
    assert [example.label for example in found.examples] == [1] * 11 + [0] * 9
    assert sum(left_out.num_rows for left_out in found.skipped.values()) == 2


@pytest.mark.parametrize(
    "targets", [["a", "b", "c"], ["a"] * 9 + ["b", "c"], [str(n % 7) for n in range(70)]]
)
def test_more_than_two_answers_are_no_answer_choices(targets):
    """Oracle: by hand; no two answers stand out, so that the rest could be damaged."""
    with pytest.raises(ValueError, match="no multiple-choice examples"):
        parse_task({"examples": [{"input": "?", "target": target} for target in targets]})


def test_tasks_that_cannot_be_ranked_are_refused(tmp_path):
    """Oracle: the message names file and reason."""
    with pytest.raises(DatasetUnavailable, match="--bigbench-dir DIR"):
        read_task_file(tmp_path / "nothing")
    with pytest.raises(ValueError, match="task.json has no multiple-choice examples"):
        parse_task({"examples": [{"input": "b", "target": "free text"}]})
    with pytest.raises(ValueError, match="task.json: task_prefix is None, and must be a text"):
        parse_task({"examples": [GOOD], "task_prefix": None})
    with pytest.raises(ValueError, match="has no examples; a task with subtasks"):
        parse_task({"name": "parent", "examples": []})
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(ValueError, match="task.json is not JSON"):
        read_task_file(tmp_path)
