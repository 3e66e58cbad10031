"""Tasks of the suites on real rows.

Oracles: strings recorded from the original FLIPPED on evaluation rows, the datasets' own labels,
and BIG-bench's, MMLU's and label generalisation's formats written out by hand.
"""

import json

import pytest

from metro.data.datasets import DatasetUnavailable
from metro.data.prompts.instruction import encoder_text
from metro.evaluation.tasks.loading import SUBTASK_STRIDE, load_task, load_tasks
from metro.evaluation.tasks.suites import TaskSpec, find_suite
from metro.evaluation.tasks.task import Sources, choose_rows
from metro.utils.messages import UserError


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


def test_rows_that_are_none_of_mmlu_are_left_out(testdata, tmp_path):
    """Oracle: by hand, the rows whose answer is one of their choices."""
    row = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    good = [row, {**row, "answer": "B"}, {**row, "answer": "1"}]
    changes = [{"question": None}, {"choices": None}, {"choices": "1, 2"}, {"answer": -1}]
    changes += [{"question": ""}, {"answer": 4}, {"answer": ""}, {"answer": None}, {"answer": True}]
    file = tmp_path / "mmlu" / "astronomy" / "test.jsonl"
    file.parent.mkdir(parents=True)
    rows = [*good, {"question": "1 + 1?"}, *({**row, **change} for change in changes)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources(tmp_path, testdata / "prompts", split="test")
    task = load_task(find_suite("mmlu").tasks["astronomy"], sources)
    assert task.weight("heres_a_problem") > 0
    found = task.examples("heres_a_problem")
    assert [(example.index, example.label) for example in found.examples] == [
        (0, 1),
        (1, 1),
        (2, 1),
    ]
    counts = {reason: left.num_rows for reason, left in found.skipped.items()}
    assert counts == {"not a row of MMLU": 7, "no label": 3}
    assert found.skipped["not a row of MMLU"].first == "row 3: it has no 'choices', 'answer'"


def test_a_bad_task_or_prompt_is_left_out_alone(testdata, tmp_path):
    """Oracle: what can be used is there, and the reasons of what cannot are named."""
    (tmp_path / "bb/good").mkdir(parents=True)
    (tmp_path / "bb/mixed/right").mkdir(parents=True)
    (tmp_path / "bb/mixed/wrong").mkdir()
    (tmp_path / "bb/free").mkdir()
    good = json.dumps({"examples": [{"input": "a", "target_scores": {"x": 1, "y": 0}}]})
    for place, text in {
        "good": good, "mixed/right": good, "mixed/wrong": "{", "free": '{"examples": [{}]}'
    }.items():  # fmt: skip
        (tmp_path / "bb" / place / "task.json").write_text(text)
    (tmp_path / "bigbench.yaml").write_text(
        "kind: bigbench\ntasks:\n  good:\n  mixed: [wrong, right]\n  free:\n"
    )
    (tmp_path / "own.yaml").write_text(
        "include: [" + str(tmp_path / "bigbench.yaml") + "]\n"
        "tasks:\n  rte:\n    dataset: super_glue\n    subset: rte\n    split: validation\n"
        "    prompts: [must be true, no such prompt]\n"
    )
    sources = Sources(testdata / "data", testdata / "prompts", tmp_path / "bb", limit=2)
    tasks, missing = load_tasks(find_suite(str(tmp_path / "own.yaml")), sources)
    assert {task.name: task.prompts for task in tasks} == {
        "good": ["task.json"], "mixed": ["right"], "rte": ["must be true"]
    }  # fmt: skip
    assert [example.index for example in tasks[1].examples("right").examples] == [SUBTASK_STRIDE]
    assert list(missing) == ["mixed / wrong", "free", "rte / no such prompt"]
    for words, reason in zip(
        ("wrong/task.json is not JSON", "no multiple-choice examples", "has no template 'no such"),
        missing.values(),
        strict=True,
    ):
        assert words in reason


@pytest.mark.parametrize(("task", "label"), [("winogrande", "answer"), ("hellaswag", "label")])
def test_rows_without_a_label_are_asked_by_no_prompt(testdata, tmp_path, task, label):
    """Oracle: the published prompts on rows whose label is hidden; with it they are asked."""
    spec = find_suite("t0").tasks[task]
    folder = tmp_path / spec.dataset / (spec.subset or "default")
    folder.mkdir(parents=True)
    file = testdata / "data" / folder.relative_to(tmp_path) / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:3]]
    for split, lines in (("validation", rows), ("test", [{**row, label: ""} for row in rows])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for split in ("validation", "test"):
        loaded = load_task(spec, Sources(tmp_path, testdata / "prompts", split=split))
        for prompt in loaded.prompts:
            if split == "validation":
                assert len(loaded.examples(prompt).examples) == 3
            else:
                with pytest.raises(UserError, match=f"no label .row 0: {label} is ''"):
                    loaded.examples(prompt)


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
        "label out of range of the answer choices": 1,
        "no label": 1,
        "empty answer choice": 1,
        "text with half a character (lone surrogate)": 1,
    }
    assert found.skipped["missing field"].first == "row 2: the row has no 'thing'"
    assert task.weight("plain") > 700


def test_rows_are_chosen_evenly_and_repeatably():
    """Oracle: by hand."""
    assert choose_rows(10, None, None) == list(range(10))
    assert choose_rows(10, None, 4) == [0, 2, 5, 7]
    sample = choose_rows(5000, 1000, None)
    assert len(set(sample)) == 1000
    assert sample == sorted(sample) == choose_rows(5000, 1000, None)
