"""Tasks of the suites on real rows.

Oracles: strings recorded from the original FLIPPED on evaluation rows, the datasets' own labels,
and BIG-bench's, MMLU's and label generalisation's formats written out by hand.
"""

import json

import pytest

from metro.data.datasets import DatasetUnavailable
from metro.data.prompts.instruction import encoder_text
from metro.evaluation.tasks.loading import SUBTASK_STRIDE, load_task
from metro.evaluation.tasks.suites import TaskSpec, find_suite
from metro.evaluation.tasks.task import Sources


@pytest.fixture(scope="module")
def sources(testdata):
    return Sources(testdata / "data", testdata / "prompts", limit=4)


def test_examples_equal_what_the_original_evaluates(golden, testdata):
    """Oracle: the recorded rows of the evaluation sets, all three methods."""
    path = golden / "flipped/formats.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    sources = Sources(testdata / "data", testdata / "prompts")
    tasks, compared = {}, 0
    for record in records:
        if record["kind"] != "evaluation" or not record["answer_choices"]:
            continue
        if record["uses_random_choice"] or record["gold_label"] is None:
            continue
        key = (record["dataset"], record["subset"], record["source_file"])
        if key not in tasks:
            path = testdata / "data" / record["source_file"]
            # subset: where the templates are; anli's is a split
            subset = None if record["dataset"] == "anli" else record["subset"]
            tasks[key] = load_task(
                TaskSpec("x", "templates", (), record["dataset"], subset, data=path), sources
            )
        task = tasks[key]
        task.templates["asked"] = task.find_template(record["template"])
        example = task.example("asked", record["source_row"], flipped=True)
        assert example.input == record["direct_input"]
        assert list(example.choices) == record["answer_choices"]
        assert example.choices[example.label] == record["gold_label"]
        encoder = encoder_text(example.flipped_input, example.choices[example.label])
        assert encoder == record["flipped_encoder_correct"]
        assert example.instruction == record["flipped_target"]
        compared += 1
    assert compared > 150


# "C1 or C2?" of COPA asks only one kind of question, and 4 rows may all be of the other.
def test_every_prompt_of_every_task_at_hand_has_examples(sources):
    """Oracle: 4 rows asked for, 4 examples; tasks without local data say so."""
    for name in ("t0", "flipped14", "bigbench", "label_generalization"):
        for flipped in (False, True):
            check_prompts(sources, name, flipped)


def check_prompts(sources, name: str, flipped: bool) -> None:
    missing = []
    for spec in find_suite(name).tasks.values():
        try:
            task = load_task(spec, sources)
        except DatasetUnavailable:
            missing.append(spec.name)
            continue
        for prompt in task.prompts:
            found = task.examples(prompt, flipped=flipped)
            assert len(found.examples) == 4, (spec.name, prompt)
            assert all((e.instruction is not None) == flipped for e in found.examples)
    expected = {
        "t0": [],
        "flipped14": ["piqa", "arc_challenge"],
        "bigbench": ["hindu_knowledge", "movie_dialog_same_or_different",
                     "vitaminc_fact_verification"],
        "label_generalization": [],
    }  # fmt: skip
    assert missing == expected[name]


def test_mmlu_is_asked_like_arc(testdata):
    """Oracle: the template of ARC-Challenge filled in by hand."""
    sources = Sources(testdata / "data", testdata / "prompts", split="test", limit=1)
    spec = find_suite("mmlu").tasks["astronomy"]
    task = load_task(spec, sources)
    [example] = task.examples("heres_a_problem").examples
    file = testdata / "data" / "mmlu" / "astronomy" / "test.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    assert list(example.choices) == ["A", "B", "C", "D"]
    assert example.label == row["answer"]
    words = example.input.split()
    assert words[:5] == ["Here's", "a", "problem", "to", "solve:"]
    shown = [f"- {x}: {text}" for x, text in zip("ABCD", row["choices"], strict=True)]
    assert " ".join(shown).split() == words[-len(" ".join(shown).split()) :]
    with pytest.raises(DatasetUnavailable, match="mmlu/anatomy has no split 'validation'"):
        load_task(find_suite("mmlu").tasks["anatomy"], Sources(testdata / "data"))


@pytest.mark.parametrize("field", ["question", "choices", "answer"])
def test_a_row_that_is_none_of_mmlu_is_named(testdata, tmp_path, field):
    """Oracle: file, row and field that is missing, in one line."""
    row = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    file = tmp_path / "mmlu" / "astronomy" / "test.jsonl"
    file.parent.mkdir(parents=True)
    spoilt = {name: value for name, value in row.items() if name != field}
    file.write_text(f"{json.dumps(row)}\n{json.dumps(spoilt)}\n")
    sources = Sources(tmp_path, testdata / "prompts", split="test")
    task = load_task(find_suite("mmlu").tasks["astronomy"], sources)
    for ask in (task.weight, task.examples):
        with pytest.raises(ValueError) as error:
            ask("heres_a_problem")
        assert str(error.value) == f"{file}: row 1 has no {field!r}: it is not a row of MMLU"


def test_subtasks_of_bigbench_keep_their_rows_apart(sources):
    """Oracle: index = subtask * stride + row."""
    task = load_task(find_suite("bigbench").tasks["logical_deduction"], sources)
    indices = [e.index for p in task.prompts for e in task.examples(p).examples]
    assert len(set(indices)) == 12
    assert [index // SUBTASK_STRIDE for index in indices] == [0] * 4 + [1] * 4 + [2] * 4


def test_label_words_are_swapped(testdata):
    """Oracle: the options of CB's template and the question it ends with."""
    suite = find_suite("label_generalization")
    for how, options in (
        ("words", ["Agree", "Disagree", "Could be"]),
        ("original", ["Yes", "No", "Maybe"]),
    ):
        sources = Sources(testdata / "data", testdata / "prompts", label_words=how)
        task = load_task(suite.tasks["cb"], sources)
        [example, *_] = task.examples(task.prompts[0], flipped=True).examples
        assert list(example.choices) == options
        question = ", ".join(options[:2]).capitalize() + f", or {options[2].lower()}?"
        assert example.input.endswith(question)
        assert question in example.instruction


def test_a_template_without_options_is_refused(sources):
    """Oracle: the message names the template."""
    spec = TaskSpec("x", "templates", ("generate_review",), "app_reviews", None, "train")
    with pytest.raises(ValueError, match="'generate_review' of app_reviews has no answer choices"):
        load_task(spec, sources).examples("generate_review")


def test_rows_without_a_question_are_left_out_and_named(tmp_path):
    """Oracle: by hand, one row for each reason; the last row is the first one's twin."""
    good = {"thing": "grass", "colours": ["red", "green"], "answer": 1}
    rows = [
        good,
        "{not json",
        {"colours": ["red", "green"], "answer": 1},
        {**good, "answer": 2},
        {**good, "colours": ["", "green"]},
        {**good, "answer": None},
        {**good, "colours": ["red \ud83d", "green"]},
        good,
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    texts = {
        "jinja": "What colour is {{thing}}? ||| {{answer_choices[answer]}}",
        "answer_choices": "{{colours | join('|||')}}",
    }
    data = tmp_path / "rows.jsonl"
    spec = TaskSpec("x", "templates", ("plain",), "x", data=data, inline={"plain": texts})
    task = load_task(spec, Sources())
    found = task.examples("plain")
    assert [example.index for example in found.examples] == [0, 7]
    assert {reason: left.num_rows for reason, left in found.skipped.items()} == {
        "unreadable row": 1,
        "missing field": 1,
        "label out of range of the answer choices": 2,
        "empty answer choice": 1,
        "text with half a character (lone surrogate)": 1,
    }
    assert found.skipped["missing field"].first == "row 2: the row has no 'thing'"
    assert task.weight("plain") > 700
