"""`metro.Ranker` gives the scores of `metro evaluate`, and averages templates.

Oracles: the score files of an evaluation of the same prompts, and softmaxes by hand.
"""

import json
import math

import pytest
import yaml

import metro
from metro.ranking.ranker import Ranker
from metro.utils.messages import UserError
from tests.ranking.conftest import MAILS, OPTIONS, TEMPLATE

TEXTS = [row["body"] for row in MAILS]


def softmax(scores):
    weights = [math.exp(score) for score in scores]
    return [weight / sum(weights) for weight in weights]


def as_suite(mails):
    prompt = {"jinja": TEMPLATE, "answer_choices": " ||| ".join(OPTIONS)}
    suite = {"title": "Mails", "tasks": {"mails": {"data": str(mails), "prompts": {"ask": prompt}}}}
    path = mails.with_name("suite.yaml")
    path.write_text(yaml.safe_dump(suite))
    return {"suite": str(path)}


def as_own_rows(mails):
    return {"data": str(mails), "template": [TEMPLATE], "options": OPTIONS}


@pytest.mark.parametrize(
    ("method", "normalization", "given"),
    [
        *[(method, "sum", as_own_rows) for method in ("direct", "channel", "flipped")],
        *[("direct", "mean", as_suite), ("direct", "calibrated", as_suite)],
        *[("flipped", "calibrated", as_own_rows)],
    ],
)
def test_scores_equal_those_of_an_evaluation(model, mails, tmp_path, method, normalization, given):
    options = {"method": method, "normalization": normalization}
    evaluation = metro.evaluate(
        model, out=tmp_path / "runs", progress=False, **given(mails), **options
    )
    [file] = evaluation.folder.rglob("scores/*/*.jsonl")
    expected = [json.loads(line) for line in file.read_text().splitlines()]
    ranker = Ranker(model, OPTIONS, template=[TEMPLATE], **options)
    for rows in (MAILS, TEXTS):  # the template reads one field: the text
        ranked = ranker(rows)
        assert [each.label for each in ranked] == [OPTIONS[e["prediction"]] for e in expected]
        for each, line in zip(ranked, expected, strict=True):
            assert list(each.log_probabilities) == OPTIONS
            assert list(each.log_probabilities.values()) == pytest.approx(line["scores"], abs=2e-5)
            assert list(each.probabilities.values()) == pytest.approx(
                softmax(line["scores"]), abs=1e-4
            )
            assert each.probability == max(each.probabilities.values())
    assert len({line["scores"][0] for line in expected}) > 5


def test_several_templates_are_averaged_and_their_agreement_is_told(model):
    """By hand: mean of the single templates' probabilities; the share of their labels."""
    templates = ["{{body}} ?", "Is {{body}} a complaint?", "{{body}}", "x {{body}} y z"]
    alone = [Ranker(model, OPTIONS, template=[template])(TEXTS) for template in templates]
    together = Ranker(model, OPTIONS, template=templates)(TEXTS)
    for number, each in enumerate(together):
        mine = [ranked[number] for ranked in alone]
        means = [sum(m.probabilities[o] for m in mine) / len(mine) for o in OPTIONS]
        assert list(each.probabilities.values()) == pytest.approx(means, abs=1e-5)
        assert each.label == OPTIONS[means.index(max(means))]
        assert each.agreement == sum(m.label == each.label for m in mine) / len(mine)
        scores = [sum(m.log_probabilities[o] for m in mine) / len(mine) for o in OPTIONS]
        assert list(each.log_probabilities.values()) == pytest.approx(scores, abs=1e-4)
    assert alone[0][0].agreement is None


def test_templates_may_draw_and_use_functions_of_promptsource(model):
    """Oracle: the same question without them; `zip` is no field of the row."""
    fancy = "{{ ['Is'] | choice }} {% for a, b in zip([body], [1]) %}{{a}}{% endfor %} it?"
    ranked = Ranker(model, OPTIONS, template=[fancy])(TEXTS[:2])
    assert ranked == Ranker(model, OPTIONS, template=["Is {{body}} it?"])(TEXTS[:2])


def test_a_template_reads_the_fields_that_it_names(model):
    """Oracle: the same template around the text that it must have read."""
    row = {"text": "a long letter", "subject": "hello", "n": 7}
    cases = [
        ("Is it? {{subject}}", None, "hello", "Is it? hello"),
        ("Is it? {{subject}}", "text", "hello", "Is it? hello"),
        ("Is it? {{text}}", "subject", "a long letter", "Is it? a long letter"),
        ("Is it? {{body}}", "subject", "hello", "Is it? hello"),
        ("{{subject}}: {{text}}", None, None, "hello: a long letter"),
        ("{{subject}}: {{text}}", "subject", "hello", "hello: a long letter"),
        ("Is it? {{n}}", None, "7", "Is it? 7"),
        (None, "subject", "hello", None),
        (None, None, "a long letter", None),
    ]
    for template, field, text, asked in cases:
        templates = template and [template]
        found = Ranker(model, OPTIONS, template=templates, text=field)(row)
        same = Ranker(model, OPTIONS, template=asked and ["{{a}}"])(asked or text)
        assert (found.text, found.log_probabilities) == (text, same.log_probabilities), template


def test_windows_change_nothing(model):
    ranker = Ranker(model, OPTIONS)
    expected = ranker(TEXTS)
    ranker.window = 3
    for found, each in zip(ranker(TEXTS), expected, strict=True):
        assert found.log_probabilities == pytest.approx(each.log_probabilities, abs=1e-5)
    assert ranker(TEXTS[0]).log_probabilities == pytest.approx(
        expected[0].log_probabilities, abs=1e-5
    )


def test_a_loaded_model_and_the_name_of_one_rank_alike(model):
    loaded = Ranker(metro.load(model), OPTIONS)(TEXTS)
    assert loaded == Ranker(model, OPTIONS)(TEXTS)


def test_options_come_from_a_field_of_each_row_a_file_or_the_template(model, tmp_path):
    """Oracle: the same options given for all."""
    expected = Ranker(model, OPTIONS, template=[TEMPLATE])(TEXTS)
    per_row = Ranker(model, template=["What is this mail? {{body}}"], options_field="choices")
    for value in (OPTIONS, json.dumps(OPTIONS), "|||".join(OPTIONS)):
        assert per_row([{**row, "choices": value} for row in MAILS]) == [*expected]
    (tmp_path / "options.txt").write_text("\ufeffcomplaint\n\nquestion \r\na praise")
    from_file = Ranker(model, template=[TEMPLATE], options_file=tmp_path / "options.txt")
    assert from_file(TEXTS) == expected
    mixed = per_row([{"body": "a", "choices": ["no", "yes"]}, {"body": "a", "choices": "x ||| y"}])
    assert [list(each.probabilities) for each in mixed] == [["no", "yes"], ["x", "y"]]


def test_templates_of_a_dataset_bring_their_answer_choices(model, tmp_path):
    folder = tmp_path / "templates/toys"
    folder.mkdir(parents=True)
    entries = {
        name: {"name": name, "jinja": jinja, "answer_choices": choices}
        for name, jinja, choices in [
            ("one", "Is {{sentence}} good? ||| {{answer_choices[label]}}", "No ||| Yes"),
            ("two", "{{sentence}}: which? ||| {{answer_choices[label]}}", "bad ||| good"),
            ("free", "Write about {{sentence}}. ||| {{label}}", None),
            ("own", "Which? ||| {{answer_choices[label]}}", "{{first}} ||| {{second}}"),
        ]
    }
    (folder / "templates.yaml").write_text(
        yaml.safe_dump({"dataset": "toys", "templates": entries})
    )
    tree = tmp_path / "templates"
    one = Ranker(model, prompt=["toys: one"], templates=tree)("the sea")
    assert list(one.probabilities) == ["No", "Yes"]
    # The family of the model folds white space: the second row then asks nothing.
    own = [{"first": a, "second": b} for a, b in (("a b", "c"), ("a b", "a  b"), ("d", "e"))]
    ranked = Ranker(model, prompt=["toys: own"], templates=tree)(own)
    assert [each.label is None for each in ranked] == [False, True, False]
    assert "a single answer choice" in ranked[1].problem
    both = Ranker(model, prompt=["toys: one", "toys: two"], templates=tree)("the sea")
    assert list(both.probabilities) == ["No", "Yes"] and both.agreement is not None
    given = Ranker(model, ["a", "b"], prompt=["toys:two"], templates=tree)("the sea")
    assert given == Ranker(model, ["a", "b"], template=["{{x}}: which?"])("the sea")
    with pytest.raises(UserError, match="no template 'thre'"):
        Ranker(model, prompt=["toys:thre"], templates=tree)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("  ", "empty text"),
        (5, "no text: the row is 5, not a text"),
        (None, "no text: the row is None"),
        ({"other": "a"}, "missing field: the row has no 'body'"),
        ({"body": "a\ud83d"}, "half a character"),
        ({"body": "a", "answer_choices": "x"}, "cannot render a row with a field"),
    ],
)
def test_a_row_that_cannot_be_ranked_has_a_problem_and_costs_no_other_row(model, row, problem):
    ranker = Ranker(model, OPTIONS, template=[TEMPLATE])
    before, bad, after = ranker([TEXTS[0], row, TEXTS[1]])
    assert bad.label is bad.probability is None and problem in bad.problem
    assert [before.label, after.label] == [each.label for each in ranker(TEXTS[:2])]


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (["a"], {}, "options has 1 labels; give at least two"),
        (["a", " "], {}, "an empty label"),
        (["a b", "a  b"], {}, "'a b' twice"),
        (None, {}, "nothing to choose from: give --options"),
        (OPTIONS, {"options_field": "x"}, "options and options_field both say"),
        (OPTIONS, {"template": ["{{x}}"], "prompt": ["a:b"]}, "template and prompt both say"),
        (OPTIONS, {"template": ["{{x"]}, "is not a template"),
        (OPTIONS, {"template": ["{{x.__class__}}"]}, "template 1 reads the attribute '__class__'"),
        (
            OPTIONS,
            {"template": ["{{x}}?", "Which?"]},
            "template 2 reads no field, and asks the same",
        ),
        (OPTIONS, {"template": ["{% if x %} a ||| b {% endif %}"]}, "is not a template"),
        (OPTIONS, {"template": ["{{x}} "], "method": "flipped"}, "template 1 has no instruction"),
        (OPTIONS, {"out": "a.txt"}, "ends in .csv, .jsonl, .parquet"),
        (None, {"options_file": "none.txt"}, "there is no file none.txt of options"),
        (OPTIONS, {"method": "channel", "normalization": "calibrated"}, "channel scores are prob"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_loaded(options, more, message):
    with pytest.raises(UserError, match=message):
        Ranker("no/such-model", options, **more)


def test_options_that_are_the_same_to_the_model_are_refused(model):
    """The toy model's vocabulary is lowercase."""
    with pytest.raises(UserError, match="'praise' and 'Praise' are the same to the model"):
        Ranker(model, ["praise", "b", "Praise"])


@pytest.mark.parametrize(
    ("dtype", "least_width", "has_products", "is_named"),
    [
        *[("fp32", 1, True, True), ("fp32", 1, False, False)],
        *[("bf16", 1, True, False), ("fp32", 256, True, False)],
    ],
)
def test_the_log_names_the_type_that_is_faster(
    monkeypatch, model, dtype, least_width, has_products, is_named
):
    """Only where a wide model is scored in float32 on a CPU with products of bfloat16."""
    monkeypatch.setattr("metro.models.loading.cpu_multiplies_bf16", lambda: has_products)
    monkeypatch.setattr("metro.evaluation.model.LEAST_BF16_WIDTH", least_width)
    ranker = Ranker(model, OPTIONS, template=[TEMPLATE], dtype=dtype, device="cpu")
    said = ranker.scored.describe()
    assert ("--precision fast" in said) is is_named
    assert f"weights in {ranker.scored.model.dtype}".replace("torch.", "") in said
