"""Prepared prompts: the original's bytes, whatever the workers and kills; bad input is counted."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metro.data import datasets, prompt_preparation
from metro.data.instruction import flip
from metro.data.prompt_settings import plan_prompts, read_settings
from metro.data.prompt_sources import Unavailable
from metro.data.prompted_examples import PromptedExamples, read_manifest
from metro.data.prompts import TemplateTree
from tests.data.prompt_toys import (
    YES_NO,
    files_of,
    make_world,
    prepare,
    random_rows,
    write_rows,
    write_templates,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_fairseq_files_equal_the_originals(testdata, tmp_path):
    """Oracle: the original's binarised mixture, and the texts that it was made of."""
    golden = testdata / "golden/prompt_T0-bin"
    raw = json.loads((golden / "raw_examples.json").read_text())
    plain = (None, "{{source}} ||| {{answer}}")
    for task, split in (("taskA_yesno", "train"), ("taskB_cont", "train"), ("taskC_next", "valid")):
        dataset, name = task.split("_")
        write_templates(tmp_path / "templates", dataset, {name: plain})
        rows = [{"source": source, "answer": answer} for source, answer in raw[task]]
        write_rows(tmp_path / "data", dataset, split, rows)
    (tmp_path / "mix.yaml").write_text("data_sets: [taskA, taskB, taskC]\n")
    result, _ = prepare(tmp_path, tmp_path / "out", vocab=testdata / "golden/tiny_vocab")
    assert result.manifest["format"] == "fairseq"
    compared = 0
    for path in sorted(result.folder.rglob("*")):
        same = golden / path.relative_to(result.folder)
        if path.suffix in (".bin", ".idx", ".txt") and "taskA_yesno/valid" not in str(path):
            assert path.read_bytes() == same.read_bytes(), path
            compared += 1
    assert compared == 3 * 4 + 2 * 3 + 3
    names = {path.relative_to(golden).as_posix() for path in golden.rglob("*") if path.is_file()}
    ours = {
        path.relative_to(result.folder).as_posix()
        for path in result.folder.rglob("*")
        if path.is_file()
    }
    missing = {name for name in names - ours if "valid/taskA" not in name}
    assert missing == {"raw_examples.json"}
    assert ours - names == {"prompts.json", "sp.model"}
    caps = json.loads((result.folder / "train/data_cap.json").read_text())
    assert caps == {"taskA_yesno": 500_000, "taskB_cont": 500_000}
    groups = json.loads((result.folder / "valid/valid_datasets.json").read_text())
    assert groups == {"taskC": ["taskC_next"], "valid": ["taskC_next"]}


def test_jsonl_holds_every_field_of_every_example(world, tmp_path):
    """Oracle: rows and templates put together by hand."""
    result, _ = prepare(world, tmp_path / "out")
    manifest = read_manifest(result.folder)
    assert manifest["splits"]["train"]["two_sub_ask"] == {
        "dataset": "two", "subset": "sub", "prompt_name": "ask", "num_examples": 300, "cap": 33,
    }  # fmt: skip
    assert set(manifest["splits"]["valid"]) == set(manifest["splits"]["train"])
    rows = random_rows(1, 300)
    examples = PromptedExamples(result.folder / "train/two_sub_ask")
    assert len(examples) == len(rows)
    for number in (0, 1, 299, -1):
        row = rows[number]
        folded = " ".join(row["text"].split())
        answer = ("No", "Yes")[row["label"]]
        assert examples[number] == {
            "task": "two_sub_ask", "dataset": "two", "subset": "sub", "prompt_name": "ask",
            "split": "train", "row": number % 300, "input": f"{folded} Good?", "target": answer,
            "answer_choices": ["No", "Yes"], "label": row["label"],
            "flipped_input": f"{row['text']}<extra_id_0>", "instruction": "<extra_id_0>  Good? ",
        }  # fmt: skip
    copied = PromptedExamples(result.folder / "valid/one_copy/valid.jsonl")
    assert (copied[3]["answer_choices"], copied[3]["label"]) == (None, None)
    assert copied[3]["flipped_input"] is None and copied[3]["instruction"] is None


def test_examples_are_a_picklable_sequence_with_source_rows(world, tmp_path):
    rows = random_rows(0, 50)
    rows[10]["text"] = " "  # empty target for "copy"
    write_rows(tmp_path / "data", "one", "train", rows)
    (tmp_path / "mix.yaml").write_text("data_sets: [one]\n")
    options = {"templates": world / "templates", "mixture": str(tmp_path / "mix.yaml")}
    result, _ = prepare(tmp_path, tmp_path / "out", **options)
    examples = PromptedExamples(result.folder / "train/one_copy")
    assert examples.rows.tolist() == [i for i in range(50) if i != 10]
    again = pickle.loads(pickle.dumps(examples))
    assert again[10]["row"] == 11 and again[-1] == examples[len(examples) - 1]
    assert [example["row"] for example in again[8:12]] == [8, 9, 11, 12]
    assert sum(1 for _ in again) == 49
    with pytest.raises(IndexError):
        again[49]
    by_hand = tmp_path / "hand.jsonl"
    by_hand.write_text('{"input": "a", "row": 3}\n\n{"input": "b", "row": 5}\n')
    found = PromptedExamples(by_hand)
    assert [found[0]["input"], found[1]["input"]] == ["a", "b"] and found.rows.tolist() == [3, 5]
    with (result.folder / "train/one_copy/train.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="prepare it again"):
        PromptedExamples(result.folder / "train/one_copy")


@pytest.mark.parametrize("format", ["jsonl", "fairseq"])
def test_workers_and_chunks_change_nothing(world, tmp_path, monkeypatch, vocab, format):
    """Oracle: one process with chunks of another size."""
    options = {"vocab": vocab, "format": format}
    alone, _ = prepare(world, tmp_path / "alone", **options)
    monkeypatch.setattr(prompt_preparation, "CHUNK_EXAMPLES", 50)
    many, _ = prepare(world, tmp_path / "many", num_workers=3, **options)
    assert files_of(alone.folder) == files_of(many.folder)


RUN = """
import sys
from metro.data import prompt_preparation
from tests.data.prompt_toys import prepare
from pathlib import Path
prompt_preparation.CHUNK_EXAMPLES, prompt_preparation.CHECKPOINT_SECONDS = 40, 0
world, out, workers, vocab = sys.argv[1:]
options = {"vocab": vocab} if vocab else {}
print(prepare(Path(world), Path(out), num_workers=int(workers), **options)[1])
"""


@pytest.mark.parametrize(("workers", "format"), [(1, "jsonl"), (2, "fairseq")])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(
    world, vocab, tmp_path, workers, format
):
    """Oracle: the same command left alone."""
    options = {"vocab": vocab} if format == "fairseq" else {}
    expected, _ = prepare(world, tmp_path / "expected", **options)
    out, state = tmp_path / "out", tmp_path / "out.partial/state.json"
    command = [sys.executable, "-c", RUN, world, out, workers, options.get("vocab", "")]
    rng, resumed, kills = random.Random(), 0, 0
    for attempt in range(12):
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        if attempt < 3:
            before = state.read_bytes() if state.exists() else None
            while process.poll() is None:
                if state.exists() and state.read_bytes() != before:
                    time.sleep(rng.random() * 0.1)
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
        said, _ = process.communicate(timeout=60)
        resumed += "continuing after" in said
        if process.returncode == 0:
            break
        assert not out.exists()
    print(f"{kills} kills, {resumed} continued")
    assert resumed >= 1 and files_of(out) == files_of(expected.folder)
    assert not out.with_name("out.partial").exists()


def test_finished_output_is_left_alone_and_other_settings_are_refused(world, tmp_path):
    out = tmp_path / "out"
    first, _ = prepare(world, out)
    first_files = files_of(first.folder)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again, said = prepare(world, out)
    assert again.was_finished and "already finished" in said[0]
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match="seed was 0 and is 1.*--overwrite"):
        prepare(world, out, seed=1)
    other, _ = prepare(world, out, seed=1, overwrite=True)
    other_files = files_of(other.folder)
    assert other_files != first_files and read_manifest(out)["seed"] == 1
    (out / "train/one_ask/train.jsonl").write_text("")
    with pytest.raises(ValueError, match="missing or was changed.*--overwrite"):
        prepare(world, out, seed=1)
    again, _ = prepare(world, out, seed=1, overwrite=True)
    assert files_of(again.folder) == other_files
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another --out"):
        prepare(world, tmp_path / "taken")


def test_random_draws_depend_on_seed_template_and_row_alone(world, tmp_path):
    def drawn(**options):
        result, _ = prepare(world, tmp_path / f"out{len(list(tmp_path.iterdir()))}", **options)
        examples = PromptedExamples(result.folder / "train/one_random_order")
        return {example["row"]: example["input"].split()[0] for example in examples}

    whole, part, other = drawn(), drawn(limit=30), drawn(seed=1)
    assert len(set(whole.values())) == 3
    assert all(whole[row] == word for row, word in part.items()) and len(part) == 30
    assert whole != other


def test_draws_in_the_options_differ_between_rows(tmp_path):
    """Claim: options drawn at random are not the same draw for every row."""
    choices = "{{ ['yes', 'sure', 'true'] | choice }} ||| no"
    write_templates(
        tmp_path / "templates", "toy", {"ask": (choices, "{{text}}? ||| {{answer_choices[0]}}")}
    )
    write_rows(tmp_path / "data", "toy", "train", random_rows(0, 40))
    (tmp_path / "mix.yaml").write_text("data_sets: [toy]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    examples = PromptedExamples(result.folder / "train/toy_ask")
    assert {example["target"] for example in examples} == {"yes", "sure", "true"}
    assert all(example["label"] == 0 for example in examples)


def test_data_that_changed_during_an_interruption_is_refused(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    monkeypatch.setattr(prompt_preparation, "CHUNK_EXAMPLES", 30)
    monkeypatch.setattr(prompt_preparation, "CHECKPOINT_SECONDS", 0)

    def stop(now):
        if now.done > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(world, tmp_path / "out", progress=stop)
    file = world / "data/one/default/train.jsonl"
    rows, written = file.read_bytes(), file.stat().st_mtime_ns
    file.write_bytes(rows + b'{"text": "more", "label": 0}\n')
    with pytest.raises(ValueError, match="unfinished run that differs: data_files was .* and is"):
        prepare(world, tmp_path / "out")
    file.write_bytes(rows)
    os.utime(file, ns=(written, written))
    result, said = prepare(world, tmp_path / "out")
    assert "continuing after 0 of 4 parts" in said[0]
    expected, _ = prepare(world, tmp_path / "expected")
    assert files_of(result.folder) == files_of(expected.folder)
    file.write_bytes(rows.replace(b"drei", b"four"))
    with pytest.raises(ValueError, match="other settings: data_files was"):
        prepare(world, tmp_path / "out")


def test_limit_spreads_over_the_rows(world, tmp_path):
    """Data sets sorted by label would otherwise lose a label."""
    result, _ = prepare(world, tmp_path / "out", limit=10, valid_limit=4)
    assert PromptedExamples(result.folder / "train/one_ask").rows.tolist() == list(
        range(0, 300, 30)
    )
    assert PromptedExamples(result.folder / "valid/one_ask").rows.tolist() == [0, 10, 20, 30]


def test_bad_rows_are_counted_and_named(tmp_path):
    """Every kind of bad input once or twice; what remains is right."""
    templates = {
        "options": ("no ||| yes", "{{text}}{% if label is not none %} ||| {{answer_choices[label]}}"
                    "{% endif %}"),
        "word": ("no ||| yes", "Say it: {{text}} ||| {{word}}"),
        "draw": (None, "{{ options | choice }} {{text}} ||| x"),
        "sum": (None, "{{text}} {{ (label + 1) }} ||| x"),
    }  # fmt: skip
    good = {"text": "t", "label": 1, "word": "yes", "options": ["a"]}
    rows = [
        good,
        {**good, "label": 5},
        {**good, "label": -1},
        {**good, "label": None},
        {**good, "word": ""},
        {**good, "word": "maybe"},
        {**good, "options": []},
        {key: value for key, value in good.items() if key != "text"},
        "{not json",
    ]
    write_templates(tmp_path / "templates", "bad", templates)
    write_rows(tmp_path / "data", "bad", "train", rows)
    (tmp_path / "mix.yaml").write_text("data_sets: [bad]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    counts = {reason: facts["count"] for reason, facts in result.manifest["dropped"].items()}
    assert counts == {
        "label out of range of the answer choices": 2,
        "no answer part": 1,
        "empty target": 1,
        "rendering failed": 2,  # an empty list to draw from; None + 1
        "missing field": 4,
        "unreadable row": 4,
    }
    first = result.manifest["dropped"]["label out of range of the answer choices"]["first"]
    assert first == "bad, 'options', row 1: answer_choices has 2 entries and none at 5"
    first = result.manifest["dropped"]["unreadable row"]["first"]
    assert first.startswith("bad, 'options', row 8: not JSON: Expecting property name")
    noted = result.manifest["noted"]["answer not among the choices (kept)"]
    assert noted == {"count": 1, "first": "bad, 'word', row 5: 'maybe' is not in ['no', 'yes']"}
    assert PromptedExamples(result.folder / "train/bad_word").rows.tolist() == [0, 1, 2, 3, 5, 6]


def test_flipped_rules_drop_what_has_no_wrong_answer(tmp_path):
    templates = {
        "two": ("no ||| yes", "{{text}} Ask. ||| {{answer_choices[label]}}"),
        "one": ("{{word}} ||| {{word}}", "{{text}} Ask. ||| {{word}}"),
        "other": ("no ||| yes", "{{text}} Ask. ||| maybe"),
        "silent": ("no ||| yes", "{{text}} ||| {{answer_choices[label]}}"),
        "bare": ("no ||| yes", "{{text}}|||{{answer_choices[label]}}"),
        "none": (None, "{{text}} Ask. ||| yes"),
    }
    write_templates(tmp_path / "templates", "bad", templates)
    write_rows(tmp_path / "data", "bad", "train", [{"text": "t", "label": 0, "word": "yes"}])
    (tmp_path / "mix.yaml").write_text(
        "data_sets: [bad]\nneeds_choices: true\nmetric: Accuracy\ncap_of: data_set\ncap: 7\n"
        "fold_whitespace: false\n"
    )
    result, _ = prepare(tmp_path, tmp_path / "out")
    counts = {reason: facts["count"] for reason, facts in result.manifest["dropped"].items()}
    assert counts == {
        "a single answer choice": 1,
        "answer not among the choices": 1,
        "no instruction to guess": 1,
    }
    assert set(result.manifest["splits"]["train"]) == {"bad_two", "bad_silent"}
    assert result.manifest["left_out"] == {"bad_none": "no answer choices"}
    assert result.manifest["cap_of"] == "data_set"
    assert {facts["cap"] for facts in result.manifest["splits"]["train"].values()} == {7}


def test_what_cannot_be_had_is_listed_and_nothing_at_all_is_an_error(world, tmp_path):
    (tmp_path / "mix.yaml").write_text("data_sets: [one, absent, two/other]\n")
    options = {"mixture": str(tmp_path / "mix.yaml")}
    result, _ = prepare(world, tmp_path / "out", **options)
    assert [(row["side"], row["name"]) for row in result.manifest["unavailable"]] == [
        ("train", "absent"), ("train", "two/other"),
    ]  # fmt: skip
    again, said = prepare(world, tmp_path / "out", **options)
    assert again.was_finished and "2 parts could not be had; --overwrite tries again" in said[0]
    assert not prepare(world, tmp_path / "out", overwrite=True, **options)[0].was_finished
    write_templates(tmp_path / "templates", "absent", YES_NO)
    options["templates"] = tmp_path / "templates"
    with pytest.raises(ValueError, match="(?s)not a single example.*absent .train.: absent is not"):
        prepare(world, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": "t00"}, "no mixture 't00': there are t0, t0p"),
        ({"data_sets": ["onee"]}, "has no data set 'onee': it has one"),
        ({"format": "arrow"}, "--format is 'arrow'"),
        ({"format": "fairseq"}, "needs a vocabulary"),
        ({"mixture": "flipped", "format": "fairseq"}, "leave --format out"),
        ({"source": "p4"}, "--source is 'p4'"),
        ({"mixture": "flipped", "source": "p3"}, "cannot come from P3"),
        ({"validation": "some"}, "--validation is 'some'"),
        ({"instruction_text": "all"}, "--instruction-text is 'all'"),
        ({"limit": 0}, "--limit is 0"),
        ({"num_workers": 0}, "--workers is 0"),
        ({"templates": "nowhere"}, "no folder of templates at nowhere"),
    ],
)
def test_wrong_options_are_refused_with_the_remedy(world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_wrong_vocabulary_is_refused(world, vocab, tmp_path):
    (tmp_path / "dict.txt").write_bytes((vocab / "dict.txt").read_bytes() + b"more 1\n")
    (tmp_path / "sp.model").write_bytes((vocab / "sp.model").read_bytes())
    with pytest.raises(ValueError, match="differ first at line"):
        prepare(world, tmp_path / "out", vocab=tmp_path)


def test_plan_tells_what_will_be_made(world, tmp_path, vocab):
    """Oracle: the preparation itself; the tokens from all examples, as nothing is capped away."""
    settings = read_settings(
        str(world / "mix.yaml"),
        templates=world / "templates",
        data_dir=world / "data",
        vocab=vocab,
        limit=16,
    )
    lines = plan_prompts(settings)
    result, _ = prepare(world, tmp_path / "out", vocab=vocab, limit=16)
    for side in ("train", "valid"):
        planned = [line for line in lines if line.side == side]
        made = result.manifest["splits"][side]
        assert sum(line.examples for line in planned) == sum(
            facts["num_examples"] for facts in made.values()
        )
        files = (result.folder / side).rglob("*.bin")
        tokens = sum(path.stat().st_size for path in files) // 2  # uint16
        assert sum(line.tokens for line in planned) == tokens
    assert not [line for line in lines if isinstance(line, Unavailable)]


def test_several_train_splits_follow_one_another(world, tmp_path):
    for split, seed in (("train_r2", 2), ("train_r1", 1), ("dev_r1", 3), ("test_r1", 4)):
        write_rows(tmp_path / "data", "one", split, random_rows(seed, 5))
    (tmp_path / "mix.yaml").write_text("data_sets: [one]\n")
    result, _ = prepare(
        tmp_path,
        tmp_path / "out",
        templates=world / "templates",
        mixture=str(tmp_path / "mix.yaml"),
    )
    train = PromptedExamples(result.folder / "train/one_ask")
    assert [(e["split"], e["row"]) for e in train][4:6] == [("train_r1", 4), ("train_r2", 5)]
    assert {e["split"] for e in PromptedExamples(result.folder / "valid/one_ask")} == {
        "dev_r1", "test_r1",
    }  # fmt: skip


def test_ready_rendered_prompts_of_p3(world, tmp_path):
    """P3's fields, one local folder per task; a task that is not there is listed."""
    rows = [
        {"inputs_pretokenized": " Is  it|||? ", "targets_pretokenized": "\nYes", "inputs": [1]},
        {
            "inputs_pretokenized": "Or?", "targets_pretokenized": "No",
            "answer_choices": ["Yes", "No"],
        },
        {"inputs_pretokenized": "Nothing?", "targets_pretokenized": ""},
        {"inputs": [1]},
    ]  # fmt: skip
    write_rows(tmp_path / "data", "P3", "train", rows, "one_ask")
    result, _ = prepare(world, tmp_path / "out", data_dir=tmp_path / "data", source="p3")
    examples = PromptedExamples(result.folder / "train/one_ask")
    assert [(e["input"], e["target"], e["label"]) for e in examples] == [
        ("Is it|||?", "Yes", None), ("Or?", "No", 1),
    ]  # fmt: skip
    assert {r: f["count"] for r, f in result.manifest["dropped"].items()} == {
        "empty target": 1, "missing field": 1,
    }  # fmt: skip
    assert "one/one_copy" in {row["name"] for row in result.manifest["unavailable"]}


def test_splits_of_p3_without_labels_are_left_out(world, tmp_path, monkeypatch):
    """P3 rendered them with the label -1, which is the last option."""
    table = {"one": datasets.DatasetEntry(splits=("train", "validation"))}
    monkeypatch.setattr(datasets, "dataset_table", lambda: table)
    rows = [{"inputs_pretokenized": "Is it?", "targets_pretokenized": "Yes"}]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "data", "P3", split, rows, "one_ask")
    write_rows(tmp_path / "data", "P3", "test", rows, "one_copy")
    (tmp_path / "mix.yaml").write_text("data_sets: [one]\n")
    options = {"templates": world / "templates", "mixture": str(tmp_path / "mix.yaml")}
    result, _ = prepare(tmp_path, tmp_path / "out", source="p3", **options)
    made = [e["split"] for e in PromptedExamples(result.folder / "valid/one_ask")]
    assert made == ["validation"]
    reasons = {(row["side"], row["name"]): row["reason"] for row in result.manifest["unavailable"]}
    assert reasons["valid", "one/one_copy"] == "no validation split with labels: it has test"


def test_data_sets_with_a_name_space_are_found(tmp_path):
    """`owner/set` is a data set without subset where the tree says so."""
    write_templates(tmp_path / "templates", "owner/set", YES_NO)
    write_rows(tmp_path / "data", "owner/set", "train", random_rows(0, 5))
    (tmp_path / "mix.yaml").write_text("data_sets: [owner/set]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    facts = result.manifest["splits"]["train"]["owner_set_ask"]
    assert (facts["dataset"], facts["subset"], facts["num_examples"]) == ("owner/set", None, 5)


def test_templates_that_share_the_name_of_a_task_are_refused(tmp_path):
    templates = {"is it?": YES_NO["ask"], "is it!": YES_NO["copy"]}
    write_templates(tmp_path / "templates", "one", templates)
    write_rows(tmp_path / "data", "one", "train", random_rows(0, 5))
    (tmp_path / "mix.yaml").write_text("data_sets: [one]\n")
    with pytest.raises(ValueError, match="'is it.' of one and 'is it!' of one both make the task"):
        prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_flipped_mixture_on_real_rows(testdata, tmp_path):
    """Oracle: the split of each template by `flip`, on rows read independently."""
    result, _ = prepare(
        testdata,
        tmp_path / "out",
        mixture="flipped",
        templates=testdata / "prompts",
        limit=5,
        valid_limit=2,
    )
    tree = TemplateTree(testdata / "prompts")
    tasks = result.manifest["splits"]["train"]
    assert len(tasks) > 110 and {facts["cap"] for facts in tasks.values()} == {500_000}
    checked, lines = 0, {}
    for task, facts in tasks.items():
        template = tree.template(facts["dataset"], facts["subset"], facts["prompt_name"])
        for example in PromptedExamples(result.folder / "train" / task):
            assert example["label"] is not None and len(example["answer_choices"]) > 1
            if "| choice" not in template.jinja:
                folder = testdata / "data" / facts["dataset"]
                file = next(folder.glob(f"{facts['subset'] or '*'}/{example['split']}.jsonl"))
                if file not in lines:
                    lines[file] = file.read_text().split("\n")
                row = json.loads(lines[file][example["row"]])
                assert (example["flipped_input"], example["instruction"]) == flip(template, row)
                rendered = template.render(row)
                assert (example["input"], example["target"]) == rendered
                checked += 1
    assert checked > 300


def test_prepared_rows_are_int32_and_offsets_int64(world, tmp_path):
    result, _ = prepare(world, tmp_path / "out", limit=3)
    folder = result.folder / "train/one_ask"
    offsets = np.load(folder / "train.offsets.npy")
    assert offsets.dtype == np.int64 and len(offsets) == 4
    assert np.load(folder / "train.rows.npy").dtype == np.int32
    assert offsets[-1] == (folder / "train.jsonl").stat().st_size
