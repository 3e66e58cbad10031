"""Prepared prompts: the original's bytes, whatever the workers; the plan tells what is made."""

import json

import pytest

from metro.data.prompts import prepare as prepare_module
from metro.data.prompts.instruction import flip
from metro.data.prompts.plan import make_plan, planned_sizes
from metro.data.prompts.sources import Unavailable
from metro.data.prompts.stored import PromptedExamples, read_manifest
from metro.data.prompts.templates import TemplateTree
from metro.data.settings import PreparePromptsSettings
from metro.data.text.vocabulary import read_vocabulary
from tests.data.prompts.toys import (
    YES_NO,
    files_of,
    prepare,
    random_rows,
    write_rows,
    write_templates,
)


def test_sources_that_training_would_cut_are_counted_for_each_task(golden, tmp_path):
    """Oracle: the vocabulary's own ids of the prompts; limits of 512 tokens, `<s>` included."""
    write_templates(tmp_path / "templates", "toy", {"a": (None, "{{text}} ||| x"),
                                                    "b": (None, "{{number}} ||| x")})  # fmt: skip
    rows = [{"text": "so " * length, "number": length} for length in (20, 509, 510, 511, 600)]
    write_rows(tmp_path / "data", "toy", "train", rows)
    (tmp_path / "mix.yaml").write_text("datasets: [toy]\n")
    result, _ = prepare(tmp_path, tmp_path / "out", vocab=golden / "tiny_vocab")
    vocabulary = read_vocabulary(golden / "tiny_vocab")
    texts = [" ".join(row["text"].split()) for row in rows]
    sizes = [len(ids) + 1 for ids in vocabulary.encode_texts(texts, True)]
    too_long = [number for number, size in enumerate(sizes) if size > 512]
    assert 0 < len(too_long) < len(rows)
    [(reason, facts)] = result.manifest["noted"].items()
    assert reason.startswith("source longer than 512 tokens")
    first = f"toy, 'a', row {too_long[0]}: {sizes[too_long[0]]} tokens"
    assert facts == {"count": len(too_long), "first": first}
    tasks = result.manifest["splits"]["train"]
    assert tasks["toy_a"]["noted"] == {reason: len(too_long)} and "noted" not in tasks["toy_b"]


def test_fairseq_files_equal_the_originals(golden, tmp_path):
    """Oracle: the original's binarised mixture, and the texts that it was made of."""
    recorded = golden / "prompt_T0-bin"
    raw = json.loads((recorded / "raw_examples.json").read_text())
    plain = (None, "{{source}} ||| {{answer}}")
    for task, split in (("taskA_yesno", "train"), ("taskB_cont", "train"), ("taskC_next", "valid")):
        dataset, name = task.split("_")
        write_templates(tmp_path / "templates", dataset, {name: plain})
        rows = [{"source": source, "answer": answer} for source, answer in raw[task]]
        write_rows(tmp_path / "data", dataset, split, rows)
    (tmp_path / "mix.yaml").write_text("datasets: [taskA, taskB, taskC]\n")
    result, _ = prepare(tmp_path, tmp_path / "out", vocab=golden / "tiny_vocab")
    assert result.manifest["format"] == "fairseq"
    compared = 0
    for path in sorted(result.folder.rglob("*")):
        same = recorded / path.relative_to(result.folder)
        if path.suffix in (".bin", ".idx", ".txt") and "taskA_yesno/valid" not in str(path):
            assert path.read_bytes() == same.read_bytes(), path
            compared += 1
    assert compared == 3 * 4 + 2 * 3 + 3
    names = {
        path.relative_to(recorded).as_posix() for path in recorded.rglob("*") if path.is_file()
    }
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


@pytest.mark.parametrize("format", ["jsonl", "fairseq"])
def test_workers_and_chunks_change_nothing(world, tmp_path, monkeypatch, vocab, format):
    """Oracle: one process with chunks of another size."""
    options = {"vocab": vocab, "format": format}
    alone, _ = prepare(world, tmp_path / "alone", **options)
    monkeypatch.setattr(prepare_module, "CHUNK_EXAMPLES", 50)
    many, _ = prepare(world, tmp_path / "many", num_workers=3, **options)
    assert files_of(alone.folder) == files_of(many.folder)


def test_plan_tells_what_will_be_made(world, tmp_path, vocab):
    """Oracle: the preparation itself; the tokens from all examples, as nothing is capped away."""
    settings = PreparePromptsSettings(
        mixture=str(world / "mix.yaml"),
        templates=world / "templates",
        data_dir=world / "data",
        vocab=vocab,
        limit=16,
    )
    lines = list(planned_sizes(make_plan(settings)))
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


def test_what_cannot_be_had_is_listed_and_nothing_at_all_is_an_error(world, tmp_path):
    (tmp_path / "mix.yaml").write_text("datasets: [one, absent, two/other]\n")
    options = {"mixture": str(tmp_path / "mix.yaml")}
    result, _ = prepare(world, tmp_path / "out", **options)
    assert [(row["side"], row["name"]) for row in result.manifest["unavailable"]] == [
        ("train", "absent"), ("train", "two/other"),
    ]  # fmt: skip
    again, said = prepare(world, tmp_path / "out", **options)
    assert again.was_finished and "2 parts were not available; --overwrite tries again" in said[0]
    assert not prepare(world, tmp_path / "out", overwrite=True, **options)[0].was_finished
    write_templates(tmp_path / "templates", "absent", YES_NO)
    options["templates"] = tmp_path / "templates"
    message = "(?s)not a single example.*absent .train., absent .valid.: it is not in"
    with pytest.raises(ValueError, match=message):
        prepare(world, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": "t00"}, "no mixture 't00': there are t0, t0p"),
        ({"datasets": ["onee"]}, "has no dataset 'onee': did you mean 'one'"),
        ({"format": "fairseq"}, "needs a vocabulary"),
        ({"mixture": "flipped", "format": "fairseq"}, "leave format out"),
        ({"mixture": "flipped", "source": "p3"}, "cannot come from P3"),
        ({"templates": "nowhere"}, "no folder of templates at nowhere"),
    ],
)
def test_wrong_options_are_refused_with_the_remedy(world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_options_that_change_nothing_are_named(world, vocab, tmp_path):
    (tmp_path / "mix.yaml").write_text("datasets: [one]\n")
    options = {"mixture": str(tmp_path / "mix.yaml"), "limit": 2, "cased": True, "vocab": vocab}
    _, said = prepare(world, tmp_path / "text", format="jsonl", **options)
    assert said == [
        "warning: --cased changes nothing: jsonl keeps the text as it is",
        f"warning: --vocab {vocab} is not used: jsonl holds text",
    ]
    _, said = prepare(world, tmp_path / "ids", instruction_text="rendered", **options)
    assert said == [
        f"warning: {vocab} has no capitals, so --cased has little effect",
        "warning: --instruction-text changes nothing: fairseq's format has no instructions",
    ]


def test_wrong_vocabulary_is_refused(world, vocab, tmp_path):
    (tmp_path / "dict.txt").write_bytes((vocab / "dict.txt").read_bytes() + b"more 1\n")
    (tmp_path / "sp.model").write_bytes((vocab / "sp.model").read_bytes())
    with pytest.raises(ValueError, match="differ first at line"):
        prepare(world, tmp_path / "out", vocab=tmp_path)


def test_flipped_mixture_on_real_rows(testdata, tmp_path):
    """Oracle: the split of each template by `flip`, on rows read independently."""
    templates = testdata / "prompts"
    options = {"mixture": "flipped", "templates": templates, "limit": 5, "valid_limit": 2}
    result, _ = prepare(testdata, tmp_path / "out", **options)
    tree = TemplateTree(templates)
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
                assert (example["input"], example["target"]) == rendered[:2]
                checked += 1
    assert checked > 300
