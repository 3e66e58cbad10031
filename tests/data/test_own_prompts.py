"""Own rows become the prompts that the template asks for, and what is left out is told.

Oracle: prompts written by hand, and counts of the rows below.
"""

import json

import pytest

from metro.data.own_prompts import DEFAULT_TEMPLATE, LEFT_OUT, prepare_own_rows
from metro.data.prompts.stored import PromptedExamples, read_manifest
from metro.data.settings import OwnRowsSettings
from metro.utils.messages import UserError
from tests.data.prepared import Said

ROWS = [{"body": f"mail {n}", "label": "good" if n % 2 else "so {so}"} for n in range(8)]
ASK = "What is this? {{body}} ||| {{label}}"


@pytest.fixture
def prepare(tmp_path):
    def run(rows=ROWS, out="out", said=None, valid_fraction=0.25, **options):
        path = tmp_path / "mails.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        needs_choices = options.pop("needs_choices", None)
        return prepare_own_rows(
            OwnRowsSettings(**options),
            str(path),
            tmp_path / out,
            valid_fraction=valid_fraction,
            needs_choices=needs_choices,
            progress=said or Said(),
        )

    return run


def examples(folder, side="train"):
    return [e for path in sorted((folder / side).iterdir()) for e in PromptedExamples(path)]


def test_a_template_makes_prompts_with_the_values_of_the_answer_to_choose_from(prepare):
    folder = prepare(template=[ASK, "Answer: {{body}} ||| {{ label }}"])
    made = examples(folder)
    assert len(made) == 12 and len(examples(folder, "valid")) == 4
    for example in made:
        question = "What is this?" if example["prompt_name"] == "template 1" else "Answer:"
        row = next(row for row in ROWS if row["body"] in example["input"])
        assert example["input"] == f"{question} {row['body']}"
        assert example["target"] == row["label"]
        assert example["answer_choices"] == ["good", "so {so}"]
        assert example["answer_choices"][example["label"]] == row["label"]
        assert example["flipped_input"] == f"<extra_id_0>{row['body']}<extra_id_1>"
        assert example["instruction"] == f"<extra_id_0> {question} <extra_id_1>  "
    assert read_manifest(folder)["mixture"] == "mails"


def test_fields_alone_are_asked_about_as_rank_asks(prepare):
    [first, *_] = examples(prepare(input_field="body", target_field="label"))
    text = DEFAULT_TEMPLATE.partition("{{answer")[0].replace("{{text}}", first["input"][:6])
    assert first["input"] == f"{text}good, so {{so}}"
    [first, *_] = examples(
        prepare(
            out="other", template=["Is it? {{body}}"], target_field="label", options=["x", "good"]
        )
    )
    assert (first["input"], first["answer_choices"]) == (
        f"Is it? {first['input'][7:]}",
        ["x", "good"],
    )
    many = [{"body": f"q {n}", "label": f"a {n}"} for n in range(8)]
    [first, *_] = examples(prepare(many, "free", input_field="body", target_field="label"))
    assert (first["input"][:2], first["target"][:2], first["answer_choices"]) == ("q ", "a ", None)


def test_rows_left_out_are_told_with_share_and_first(prepare):
    rows = [*ROWS, {"body": "", "label": "good"}, {"body": "x"}, {"body": "y", "label": "bad"}]
    said = Said()
    folder = prepare(rows, said=said, template=[ASK], options=["good", "so {so}"])
    assert len(examples(folder)) + len(examples(folder, "valid")) == 9  # a prompt without a body
    found = {each["reason"]: each for each in json.loads((folder / LEFT_OUT).read_text())}
    assert found.keys() == {"missing field", "answer not among the choices"}
    assert all(each["rows"] == 1 and each["share"] == 1 / 11 for each in found.values())
    assert found["missing field"]["first"].startswith("mails, 'template 1', row ")
    assert any("1 row left out (9.09 %): missing field (first: mails" in s for s in said.lines)


def test_changed_rows_are_prepared_again_and_equal_ones_are_not(prepare):
    folder = prepare(template=[ASK])
    before = (folder / "prompts.json").stat().st_mtime_ns
    assert (prepare(template=[ASK]) / "prompts.json").stat().st_mtime_ns == before
    prepare([{**row, "body": "new"} for row in ROWS], template=[ASK])
    assert {example["input"] for example in examples(folder)} == {"What is this? new"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": ["{{body}}"]}, "template 1 has no answer: write it behind"),
        ({"template": ["Which? ||| {{label}}"]}, "template 1 reads no field, and asks the same"),
        ({"input_field": "text", "target_field": "label"}, "no field 'text': it has body, label"),
        ({"input_field": "body"}, "target_field is missing"),
        ({"template": [ASK], "input_field": "body"}, "both say how to ask"),
        ({"options": ["a", "b"]}, "options is for rows of your own"),
        ({"template": [ASK], "options": ["a"]}, "options has 1 labels; give at least two"),
        ({"template": [ASK], "options": ["a", "b|||c"]}, r"without \|\|\|"),
        (
            {"template": ["{{bodi}} ||| {{label}}"], "needs_choices": "evaluation"},
            "mails.jsonl has no field 'bodi': it has body, label",
        ),
        (
            {"template": ["{{body}} ||| {{lable}}"], "needs_choices": "evaluation"},
            "mails.jsonl has no field 'lable': it has body, label",
        ),
        ({"template": ["{{answer_choices}} ||| {{label}}"]}, "template 1 reads no field"),
        (
            {"template": [ASK], "options": ["a", "b"]},
            r"(?s)mails.jsonl: no row makes a prompt.*8 dropped \(100.00 %\): answer not among",
        ),
        (
            {"template": ["{{body}} ||| {{body}}"], "needs_choices": "objective flipped"},
            "objective flipped needs answer choices, but 'body' in .*mails.jsonl has 6 values in 6 "
            "rows: too many to choose from: give --options",
        ),
    ],
)
def test_what_does_not_fit_is_named(prepare, options, message):
    with pytest.raises(UserError, match=message):
        needs = {k: options.pop(k) for k in ("needs_choices",) if k in options}
        OwnRowsSettings(**options).check_own_rows("mails.jsonl")
        prepare(**options, **needs)
