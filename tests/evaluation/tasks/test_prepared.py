"""Prepared prompts and evaluations: the same examples, and a prepared folder as a suite.

Oracles: the two ways to an example, held against each other; the classifier called on the examples
of each template by itself.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import metro
from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.stored import PromptedExamples, read_manifest
from metro.evaluation.runs.run_folder import read_run
from metro.evaluation.scoring.metrics import measure
from metro.evaluation.scoring.pair_scoring import PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.loading import load_task, load_tasks
from metro.evaluation.tasks.suites import find_suite, read_suite
from metro.evaluation.tasks.task import Sources
from metro.utils.messages import UserError
from tests.data.prepared import Said
from tests.data.prompts.toys import make_world, prepare, random_rows, write_rows, write_templates
from tests.evaluation.golden import load_exported
from tests.evaluation.toy import run

DRAWING = {
    "draw": (
        "{{ ['No', 'Never', 'Not at all'] | choice }} ||| {{ ['Yes', 'Sure'] | choice }}",
        "{{ ['Well', 'So', 'Now', 'Then'] | choice }}, {{text}} Good? ||| "
        "{{answer_choices[label]}}",
    )
}
SUITE = """
tasks:
  first: {dataset: toy, split: validation, prompts: [draw]}
  second: {dataset: toy, split: test, prompts: [draw]}
"""


@pytest.mark.parametrize("seed", [0, 5])
def test_preparing_and_evaluating_make_the_same_examples(tmp_path, seed):
    """Oracle: every field of the prepared examples, in a template that draws at random."""
    write_templates(tmp_path / "templates", "toy", DRAWING)
    for number, split in enumerate(("test", "train", "validation")):
        write_rows(tmp_path / "data", "toy", split, random_rows(number, 30))
    (tmp_path / "mix.yaml").write_text("datasets: [toy]\nfold_whitespace: false\n")
    (tmp_path / "suite.yaml").write_text(SUITE)
    result, _ = prepare(tmp_path, tmp_path / "out", seed=seed)
    prepared = {}
    for example in PromptedExamples(result.folder / "valid/toy_draw"):
        prepared.setdefault(example["split"], []).append(EvaluationExample.of(example))
    sources = Sources(tmp_path / "data", tmp_path / "templates", seed=seed)
    for spec in read_suite(tmp_path / "suite.yaml").tasks.values():
        asked = load_task(spec, sources).examples("draw", flipped=True).examples
        assert [example.index for example in asked] == list(range(30))
        expected = prepared[spec.split]
        for name in ("input", "choices", "label", "flipped_input", "instruction"):
            assert [getattr(e, name) for e in asked] == [getattr(e, name) for e in expected]
    drawn = Counter(example.input.split(",")[0] for example in prepared["test"])
    assert set(drawn) == {"Well", "So", "Now", "Then"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two datasets; "copy" has no answer choices, one row has none of them as its answer."""
    world = make_world(tmp_path_factory.mktemp("world"), num_rows=4)
    templates = {"word": ("No ||| Yes", "{{text}} Good? ||| {{word}}")}
    write_templates(world / "templates", "odd", templates)
    rows = [{**row, "word": ["No", "Yes"][row["label"]]} for row in random_rows(7, 13)]
    rows[6]["word"] = "Perhaps"
    for split in ("train", "validation"):
        write_rows(world / "data", "odd", split, rows)
    (world / "mix.yaml").write_text("datasets: [one, two/sub, odd]\n")
    return prepare(world, world / "out")[0].folder


@pytest.mark.parametrize("method", ["direct", "channel", "flipped"])
def test_a_prepared_folder_is_evaluated_as_a_suite(golden, tmp_path, prepared, method):
    """Oracle: the classifier on the examples of each template that can be ranked."""
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    run(tmp_path / "run", prepared, model, tokenizer, method=method)
    found = {(result.task, result.prompt): result for result in read_run(tmp_path / "run").results}
    assert set(found) == {
        ("one", "ask"), ("one", "random order"), ("two/sub", "ask"), ("two/sub", "random order"),
        ("odd", "word"),
    }  # fmt: skip
    target_length = 512 if method == "channel" else 256
    encoder = PromptEncoder(tokenizer, max_source_length=512, max_target_length=target_length)
    classifier = RankClassifier(PairScorer(model), encoder, method)
    for task, facts in read_manifest(prepared)["splits"]["valid"].items():
        examples = PromptedExamples(prepared / "valid" / task)
        questions = [
            EvaluationExample.of(example)
            for example in examples
            if example["answer_choices"] and example["label"] is not None
        ]
        name = "/".join(filter(None, (facts["dataset"], facts["subset"])))
        if not questions:
            assert (name, facts["prompt_name"]) not in found
            continue
        rankings = classifier.rank(questions)
        expected = measure(questions, [ranking.prediction for ranking in rankings])
        result = found[name, facts["prompt_name"]]
        assert (result.accuracy, result.macro_f1) == (expected.accuracy, expected.macro_f1)
        assert result.num_examples == len(questions) == (12 if name == "odd" else 40)


def test_a_prepared_folder_is_never_taken_for_a_suite_of_metro(prepared, tmp_path, monkeypatch):
    """Oracle: the tasks; t0 has 11 others."""
    folder = tmp_path / "t0"
    folder.symlink_to(prepared)
    (tmp_path / "p.v1").mkdir()
    shutil.copytree(prepared, tmp_path / "p.v1", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("./t0", str(folder), "p.v1/", "p.v1/../p.v1"):
        assert sorted(find_suite(name).tasks) == ["odd", "one", "two/sub"]
    assert find_suite("p.v1").name == "prepared-p.v1"
    assert find_suite("t0").name == "t0" and len(find_suite("t0").tasks) == 11
    monkeypatch.chdir(tmp_path / "p.v1")
    assert find_suite(".").name == "prepared-p.v1"


def test_a_folder_that_was_prepared_again_is_not_resumed(golden, tmp_path):
    """Oracle: the message; another seed of the same rows and prompts, then as before."""
    world = make_world(tmp_path, num_rows=4)
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    prepare(world, world / "out")
    assert run(tmp_path / "run", world / "out", model, tokenizer) == 4
    prepare(world, world / "out", seed=5, overwrite=True)
    with pytest.raises(UserError, match="on other data of task .*changed or prepared again"):
        run(tmp_path / "run", world / "out", model, tokenizer)
    prepare(world, world / "out", overwrite=True)
    assert run(tmp_path / "run", world / "out", model, tokenizer) == 0


def test_options_that_prepared_prompts_cannot_use_are_named_and_not_recorded(
    golden, tmp_path, prepared
):
    """Oracle: run.json of the evaluation without them."""
    found = []
    for name, options in (("a", {}), ("b", {"seed": 7, "instruction_text": "rendered"})):
        said = Said()
        folder = metro.evaluate(
            str(golden / "hf_export/t5_prompt_tiny_f"), suite=str(prepared), device="cpu",
            out=tmp_path / name, progress=said, tasks=["odd"], **options,
        ).folder  # fmt: skip
        assert folder == tmp_path / name / "t5_prompt_tiny_f-direct-prepared-out"
        found.append(json.loads((folder / "run.json").read_text()))
        warned = [line for line in said.lines if "--instruction-text, --seed not used" in line]
        assert len(warned) == len(options) // 2
    assert found[0] == found[1]


def test_a_suite_file_names_a_prepared_folder(prepared, tmp_path):
    """Oracle: the tasks that the file lists."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"kind: prepared\ntitle: Mine\nfolder: {prepared}\ntasks: [odd, two/sub]\n")
    suite = find_suite(str(path))
    assert (suite.name, suite.title, sorted(suite.tasks)) == ("mine", "Mine", ["odd", "two/sub"])
    task = load_task(suite.tasks["odd"], Sources(limit=5))
    assert [example.index for example in task.examples("word").examples] == [0, 2, 5, 7, 10]
    skipped = load_task(suite.tasks["odd"], Sources()).examples("word").skipped
    assert {reason: left.num_rows for reason, left in skipped.items()} == {
        "answer not among the choices": 1
    }
    assert load_task(suite.tasks["odd"], Sources(split="train")).rows("word") == list(range(13))
    path.write_text(f"kind: prepared\nfolder: {prepared}\ntasks: [ode]\n")
    with pytest.raises(ValueError, match="no task 'ode': did you mean 'one' or 'odd'"):
        find_suite(str(path))


def test_damaged_prompts_and_lines_are_left_out_alone(prepared, tmp_path):
    """Oracle: by hand, the first line of one file damaged, another file cut at its end."""
    folder = Path(shutil.copytree(prepared, tmp_path / "out"))
    cut = folder / "valid/one_ask/valid.jsonl"
    text = cut.read_bytes()
    cut.write_bytes(b"?" + text[1:])
    short = folder / "valid/one_random_order/valid.jsonl"
    short.write_bytes(short.read_bytes()[:-20])
    tasks, missing = load_tasks(find_suite(str(folder)), Sources())
    assert "ask" not in {task.name: task.prompts for task in tasks}.get("one", [])
    assert "one_ask/valid.jsonl was damaged" in str(missing)
    (folder / "prompts.json").write_text(json.dumps({**read_manifest(folder), "files": {}}))
    tasks, missing = load_tasks(find_suite(str(folder)), Sources())
    assert {task.name: task.prompts for task in tasks}["one"] == ["ask"]
    assert list(missing) == ["one / random order"] and "does not end where" in str(missing)
    found = next(task for task in tasks if task.name == "one").examples("ask")
    assert len(found.examples) == 39 and found.skipped["unreadable row"].num_rows == 1


def test_examples_with_fields_of_another_kind_are_left_out_alone(prepared, tmp_path):
    """Oracle: by hand, one line for each change; the rest is evaluated as before."""
    changes = [{"input": None}, {"input": 5}, {"target": 3}, {"row": "7"}, {"label": "1"}]
    changes += [{"label": 0.5}, {"answer_choices": "No"}, {"answer_choices": ["No", 1]}]
    changes += [{"instruction": 3}, {"flipped_input": ["x"]}]
    folder = Path(shutil.copytree(prepared, tmp_path / "out"))
    (folder / "valid/one_ask/valid.offsets.npy").unlink()
    file = folder / "valid/one_ask/valid.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, **change} for row, change in zip(rows, changes, strict=False)] + rows[10:]
    rows[10]["label"] = 1 - rows[10]["label"]
    rows[11]["input"] = " "
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.json").write_text(json.dumps({**read_manifest(folder), "files": {}}))
    tasks, _ = load_tasks(find_suite(str(folder)), Sources())
    found = next(task for task in tasks if task.name == "one").examples("ask")
    assert [example.index for example in found.examples] == [row["row"] for row in rows[12:]]
    assert {why: left_out.num_rows for why, left_out in found.skipped.items()} == {
        "not a prepared example": 10,
        "label of another answer choice than the target": 1,
        "empty input": 1,
    }


def test_folders_without_held_out_text_are_refused(prepared, tmp_path):
    """Oracle: the message names folder and remedy."""
    with pytest.raises(ValueError, match="is not a folder of prepared prompts"):
        find_suite(str(tmp_path))
    manifest = read_manifest(prepared)
    for changed, message in (
        ({"format": "fairseq"}, "holds ids: prepare it with --format jsonl"),
        ({"splits": {"train": {}, "valid": {}}}, "no held-out examples .* --validation all"),
        ({"splits": {"train": {}}}, "no held-out examples .* --validation all"),
    ):
        (tmp_path / "prompts.json").write_text(json.dumps({**manifest, **changed}))
        with pytest.raises(ValueError, match=message):
            find_suite(str(tmp_path))
