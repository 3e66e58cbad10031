"""Rows without a label are noted, whatever class the template makes of them; labels are not.

Oracle: the templates, written in the ways of the published ones, and what their rows say.
"""

import pytest

from metro.data.prompts.limits import TemplateError
from metro.data.prompts.templates import PromptTemplate

NAN = float("nan")
READS_LABEL = {
    "else": "{{t}} ||| {% if label == 1 %}yes{% else %}no{% endif %}",
    "else of a text": '{{t}} ||| {% if label == "1" %}yes{% elif label == "0" %}no{% else %}no'
    "{% endif %}",
    "not": "{{t}} ||| {% if not (label != 1) %}yes{% else %}no{% endif %}",
    "list": "{{t}} ||| {% if label in [1, 2] %}yes{% else %}no{% endif %}",
    "short": '{{t}} ||| {{ "yes" if label == 1 else "no" }}',
    "number of a text": "{{t}} ||| {{ answer_choices[label | int] }}",
    "options of a row": "{{t}} ||| {{ options[label] }}",
    "options from 1 on": "{{t}} ||| {{ options[(label | int) - 1] }}",
    "place in a text": '{{t}} ||| {{ answer_choices["nyn".find(label | string)] }}',
    "mapping": '{{t}} ||| {{ {"1": "yes"}.get(label | string, "no") }}',
    "before the answer": "{% set word = 'yes' if label == 1 else 'no' %}{{t}} ||| {{word}}",
    "two answers": "{% if label == 1 %}{{t}}! ||| yes{% else %}{{t}}? ||| no{% endif %}",
    "truth": "{{t}} ||| {% if label %}yes{% else %}no{% endif %}",
    "truth of a part": '{{t}} ||| {{ "yes" if label.strip() | length else "no" }}',
    "test": '{{t}} ||| {{ "yes" if label is eq 1 else "no" }}',
    "test of a list": '{{t}} ||| {{ "yes" if label is in [1, 2] else "no" }}',
    "nested": "{{t}} ||| {% if row.label == 1 %}yes{% else %}no{% endif %}",
}


def render(jinja: str, label):
    template = PromptTemplate("toy", None, "made", jinja, "no ||| yes")
    row = {"t": "t", "label": label, "options": ["no", "yes"], "row": {"label": label}}
    return template.render(row)


def unlabelled(jinja: str, label) -> bool:
    try:
        made = render(jinja, label)
    except ValueError:
        return True  # refused, as answer_choices[-1]
    return bool(made.unlabelled or made.missing) or made.target not in ("no", "yes")


@pytest.mark.parametrize("name", READS_LABEL)
@pytest.mark.parametrize("label", [-1, -1.0, "", " ", None, NAN])
def test_no_label_is_taken_for_a_class(name, label):
    assert unlabelled(READS_LABEL[name], label)


@pytest.mark.parametrize("label", [0, 1, True, False, 2.5, 1.0, 7])
@pytest.mark.parametrize("name", ["else", "list", "short", "before the answer", "truth", "test"])
def test_numbers_are_labels(name, label):
    assert render(READS_LABEL[name], label).unlabelled == ()


@pytest.mark.parametrize("label", ["0", "1", "-1", "b"])
@pytest.mark.parametrize("name", ["else of a text", "truth"])
def test_texts_are_labels(name, label):
    """Also one that looks like a number."""
    assert render(READS_LABEL[name], label).unlabelled == ()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *[(name, "1") for name in ("else", "list", "not", "short", "test", "test of a list")],
        *[("else of a text", label) for label in (1, 0, 1.0)],
        *[("number of a text", label) for label in ("b", "1x")],
    ],
)
def test_a_label_of_another_kind_than_the_template_asks_for_is_refused(name, label):
    """Oracle: Jinja's `"1" == 1` is false and `"b" | int` is 0, so that every row is a "no"."""
    with pytest.raises(TemplateError, match="compares label, which is|is not a number"):
        render(READS_LABEL[name], label)


def test_whole_numbers_of_a_column_with_gaps_are_indices():
    assert render("{{t}} ||| {{ answer_choices[label] }}", 1.0).label == 1
    assert unlabelled("{{t}} ||| {{ answer_choices[label] }}", 0.5)


@pytest.mark.parametrize(
    ("jinja", "label"),
    [
        ("{{t}} ||| {% if label == -1 %}no{% else %}yes{% endif %}", -1),
        ("{{t}} ||| {{ answer_choices[label + 1] }}", -1),
        ("{{t}} ||| {% if label < 0 %}no{% else %}yes{% endif %}", -1),
        ('{{t}} ||| {% if label == "" %}no{% else %}yes{% endif %}', ""),
        ("{{t}} ||| {% if label is none %}no{% else %}yes{% endif %}", None),
        ('{{t}} ||| {{ "yes" if label is eq(-1) else "no" }}', -1),
        ('{{t}} ||| {{ "yes" if label in ["", "a"] else "no" }}', ""),
        ('{{t}} ||| {{ "yes" if label | string == "1" else "no" }}', 1),
        ('{{t}} ||| {{ "yes" if label in [1, "1"] else "no" }}', "1"),
        ("{{t}} ||| {{ answer_choices[label | default(0) | int] }}", 1),
        ("{{ t if label else 'x' }} {{ options[label] }} ||| yes", -1),  # in the prompt alone
    ],
)
def test_values_that_a_template_knows_are_classes(jinja, label):
    made = render(jinja, label)
    assert made.unlabelled == () and made.label is not None


def test_the_note_names_field_and_value():
    jinja = "{{t}} ||| {% if row.label == 1 %}yes{% else %}no{% endif %}"
    assert render(jinja, -1).unlabelled == ("row.label is -1",)


def test_hidden_labels_of_every_template_at_hand_are_found(testdata, tree):
    """Oracle: fields whose other values in the data give the same prompt another answer."""
    from metro.data.jsonl_rows import JsonlRows
    from metro.data.prompts.examples import ExampleSettings, UnusableRow, make_example

    settings, tried = ExampleSettings(needs_choices=True, with_instruction=False), set()

    def answer(template, row):
        try:
            made = make_example(template, row, "test", 0, settings)
        except UnusableRow:
            return None
        return made["input"], made["answer_choices"], made["target"]

    for dataset, subset in tree.datasets():
        for file in sorted((testdata / "data" / dataset).glob(f"{subset or '*'}/*.jsonl"))[-1:]:
            rows = list(JsonlRows(file, limit=6))
            for template in tree.templates(dataset, subset):
                told = answer(template, rows[0]) if template.answer_choices else None
                for name in rows[0] if told else ():
                    others = [answer(template, {**rows[0], name: row[name]}) for row in rows]
                    if any(x and x[:2] == told[:2] and x[2] != told[2] for x in others):
                        tried.add((dataset, subset, template.name))
                        for hidden in (-1, "", None, NAN):
                            assert answer(template, {**rows[0], name: hidden}) is None
    assert len(tried) > 100
