"""Where examples come from: splits, P3, and names of datasets and tasks."""

import pytest

from metro.data import datasets
from metro.data.prompts.sources import Unavailable
from metro.data.prompts.stored import PromptedExamples
from metro.data.prompts.templates import TemplateTree
from tests.data.prompts.toys import YES_NO, prepare, random_rows, write_rows, write_templates


def test_several_train_splits_follow_one_another(world, tmp_path):
    for split, seed in (("train_r2", 2), ("train_r1", 1), ("dev_r1", 3), ("test_r1", 4)):
        write_rows(tmp_path / "data", "one", split, random_rows(seed, 5))
    (tmp_path / "mix.yaml").write_text("datasets: [one]\n")
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
    (tmp_path / "mix.yaml").write_text("datasets: [one]\n")
    options = {"templates": world / "templates", "mixture": str(tmp_path / "mix.yaml")}
    result, _ = prepare(tmp_path, tmp_path / "out", source="p3", **options)
    made = [e["split"] for e in PromptedExamples(result.folder / "valid/one_ask")]
    assert made == ["validation"]
    reasons = {(row["side"], row["name"]): row["reason"] for row in result.manifest["unavailable"]}
    assert reasons["valid", "one/one_copy"] == "no validation split with labels: it has test"


def test_datasets_with_a_name_space_are_found(tmp_path):
    """`owner/set` is a dataset without subset where the tree says so."""
    write_templates(tmp_path / "templates", "owner/set", YES_NO)
    write_rows(tmp_path / "data", "owner/set", "train", random_rows(0, 5))
    (tmp_path / "mix.yaml").write_text("datasets: [owner/set]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    facts = result.manifest["splits"]["train"]["owner_set_ask"]
    assert (facts["dataset"], facts["subset"], facts["num_examples"]) == ("owner/set", None, 5)


def test_bad_templates_and_files_are_left_out_alone(tmp_path):
    """Oracle: by hand, the templates that are left; the others, and a file that is no text, by
    their names. Names of other scripts never share a task."""
    long = ["x" * 300, "x" * 299 + "y"]
    names = ["is it?", "is it!", "好吗", "坏吗", *long, "twice"]
    write_templates(tmp_path / "templates", "one", dict.fromkeys(names, YES_NO["ask"]))
    file = tmp_path / "templates/one/templates.yaml"
    text = file.read_text(encoding="utf-8")
    more = text[text.index("  6: !Template") :].replace("  6:", "  7:")
    nul = more.replace("7:", "9:").replace("twice", '"half \\0"')
    text += f"{more}  8: !Template\n    name: no text\n{nul}"
    file.write_text(text, encoding="utf-8")
    write_templates(tmp_path / "templates", "two", {"ask": YES_NO["ask"]})
    write_rows(tmp_path / "data", "one", "train", random_rows(0, 5))
    write_rows(tmp_path / "data", "two", "train", []).write_bytes("{}".encode("utf-16"))
    write_templates(tmp_path / "templates", "gone", {"ask": YES_NO["ask"]})
    write_rows(tmp_path / "data", "gone", "train", []).unlink()
    (tmp_path / "data/gone/default/train.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "mix.yaml").write_text("datasets: [one, two, gone]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    made = result.manifest["splits"]["train"]
    assert [facts["prompt_name"] for facts in made.values()] == ["is it?", "好吗", "坏吗", *long]
    left_out = [row for row in result.manifest["unavailable"] if row["side"] == "train"]
    reasons = {row["name"]: row["reason"] for row in left_out}
    for name, words in (
        ("one/is it!", "'is it?' of one and 'is it!' of one both make the task one_is_it_"),
        ("one/twice", "two templates named 'twice'"),
        ("one/no text", "has no text `jinja`"),
        ("two", "is UTF-16 and not UTF-8"),
        ("one/half \0", "template 9 has a text with a NUL character"),
        ("gone", "train.jsonl does not exist: correct the path"),
    ):
        assert words in reasons.pop(name)
    assert not reasons
    tree = TemplateTree(tmp_path / "templates")
    with pytest.raises(ValueError, match="two templates named 'twice'"):
        tree.template("one", None, "twice")


def test_a_reason_is_told_without_the_name_that_stands_alone_in_it():
    """Oracle: by hand; a name of one letter occurs in other words."""
    reason = Unavailable("train", "d", "no split of d in data/d/default: it has validation")
    assert reason.reason_of_any == "no split of it in data/d/default: it has validation"
