"""Templates split into instruction and input, against strings recorded from the original FLIPPED.

Oracles: the recorded formats (394 rows of 22 datasets), and the rule applied by hand to small
templates.
"""

import json

import pytest

from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.instruction import encoder_text, flip, sentinels_for, split_template
from metro.data.prompts.templates import PromptTemplate
from metro.utils.messages import UserError

# How many templates "rendered" changes, as the module says. cosmos_qa's is not trained on.
CHANGED = {"quartz": 8, "super_glue/copa": 8, "super_glue/wsc.fixed": 2, "cosmos_qa": 1}


@pytest.fixture(scope="module")
def records(golden):
    path = golden / "flipped/formats.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def template_of(tree, record) -> PromptTemplate:
    subset = None if record["dataset"] == "anli" else record["subset"]
    return tree.template(record["dataset"], subset, record["template"])


def template(jinja: str, choices: str | None = "yes ||| no") -> PromptTemplate:
    return PromptTemplate("toy", None, "plain", jinja, choices)


def test_published_strings_equal_the_originals(records, tree):
    """Oracle: recorded encoder and decoder strings of every row; draws take the first item."""
    compared = 0
    for record in records:
        if record["flipped_target"] is None:
            continue
        flipped = flip(template_of(tree, record), record["row"], seed=None)
        gold = record["gold_label"] or record["channel_input"]
        where = (record["dataset"], record["template"])
        assert encoder_text(flipped.input, gold) == record["flipped_encoder_correct"], where
        assert flipped.instruction == record["flipped_target"], where
        if record["flipped_encoder_wrong"] is not None:
            wrong = encoder_text(flipped.input, record["wrong_label"])
            assert wrong == record["flipped_encoder_wrong"], where
        compared += 1
    assert compared > 380


def test_rendered_differs_for_conditional_templates_only(records, tree):
    """Oracle: the published strings, and the table above, counted on all rows we have."""
    changed = {}
    for record in records:
        if record["flipped_target"] is None:
            continue
        source = template_of(tree, record)
        published = flip(source, record["row"], seed=None)
        rendered = flip(source, record["row"], instruction_text="rendered", seed=None)
        if rendered != published:
            name = "/".join(filter(None, (record["dataset"], record["subset"])))
            changed.setdefault(name, set()).add(source.name)
    assert {name: len(templates) for name, templates in changed.items()} == CHANGED


def test_published_keeps_and_rendered_drops_branches_not_taken():
    """Oracle: by hand."""
    source = template("Who?{% if cause %} Because {{a}}{% else %} So {{b}}{% endif %} End ||| x")
    row = {"cause": False, "a": "A", "b": "B"}
    assert flip(source, row).input == "<extra_id_0><extra_id_2>B<extra_id_3>"
    assert flip(source, row).instruction == (
        "<extra_id_0> Who?<extra_id_1>  Because <extra_id_2>  So <extra_id_3>  End "
    )
    rendered = flip(source, row, instruction_text="rendered")
    assert rendered.input == "<extra_id_0><extra_id_1>B<extra_id_2>"
    assert rendered.instruction == "<extra_id_0> Who?<extra_id_1>  So <extra_id_2>  End "


def test_loops_repeat_their_sentinel_and_strings_in_tags_stay_input():
    """Oracle: by hand."""
    source = template('{% for x in xs %}- {{x}}{% endfor %}{{ "{%}" }}? ||| a')
    for text in ("published", "rendered"):
        flipped = flip(source, {"xs": ["p", "q"]}, instruction_text=text)
        assert flipped.input == "<extra_id_0>p<extra_id_0>q{%}<extra_id_1>"
        assert flipped.instruction == "<extra_id_0> - <extra_id_1> ? "


def test_bars_in_data_and_conditions_around_the_answer():
    """Oracle: by hand. Only the template's own ``|||`` ends the input."""
    source = template("{% if ok %}Say {{x}} ||| {{x}}{% endif %}")
    assert flip(source, {"ok": True, "x": "a ||| b"}).input == "<extra_id_0>a ||| b<extra_id_1>"
    with pytest.raises(UnusableRow, match="renders no answer for this row"):
        flip(source, {"ok": False, "x": "a"})


def test_templates_without_instruction_are_refused():
    """Oracle: the reason is one, the detail says what is missing."""
    with pytest.raises(UnusableRow, match="no instruction to guess: .* no text outside"):
        flip(template("{{x}}{{y}}|||{{x}}"), {"x": "a", "y": "b"})
    with pytest.raises(UnusableRow, match="renders no text outside .* for this row"):
        flip(
            template("{% if x %}Say{% endif %}{{y}}|||{{y}}"),
            {"x": 0, "y": "b"},
            instruction_text="rendered",
        )
    with pytest.raises(ValueError, match="'both'; use one of published, rendered"):
        flip(template("Say {{x}} ||| a"), {"x": "a"}, instruction_text="both")


def test_split_keeps_blanks_and_lone_braces():
    """Oracle: by hand."""
    split = split_template("{{a}} \n{{b}} { x } {# note #}!|||{{c}}")
    assert split.runs == (" \n", " { x } ", "!")
    assert split.answer == "{{c}}"
    assert split_template("{{a}} no answer").answer is None


def test_split_reads_tags_as_jinja_does():
    """Oracle: by hand: strings hold braces and bars, `-` takes the blanks beside it."""
    source = template(
        """It is {{a -}} . {{'"}}' ~ b}} {%- if x %} "{{ "|||" }}" {% endif -%} ? ||| y"""
    )
    assert split_template(source.jinja).runs == ("It is ", ". ", ' "', '" ', "? ")
    row = {"a": "A", "b": "B", "x": 1}
    flipped = flip(source, row)
    assert flipped.input == '<extra_id_0>A<extra_id_1>"}}B<extra_id_2>|||<extra_id_3><extra_id_4>'
    with pytest.raises(UserError, match="'Is .* is not a template: unexpected char"):
        split_template("Is {{a?}}")
    assert split_template("Is {{a").pieces == (("Is ", False), ("{{a", True))


class Words:
    """A vocabulary, as far as sentinels are looked up."""

    def __init__(self, *words):
        self.words = {word: number for number, word in enumerate(words)}

    def get_vocab(self):
        return self.words


def test_sentinels_of_both_kinds_of_vocabulary():
    """Oracle: the names that T5 and METRO publish; METRO's ``<sen000>`` is its mask."""
    t5 = Words("a", "<extra_id_1>", "<extra_id_0>")
    metro = Words("a", "<sen000>", "<sen001>", "<sen002>", "<sen003>")
    assert sentinels_for(t5) == ["<extra_id_0>", "<extra_id_1>"]
    assert sentinels_for(metro) == ["<sen001>", "<sen002>", "<sen003>"]
    with pytest.raises(ValueError, match="has no sentinels"):
        sentinels_for(Words("a"))
