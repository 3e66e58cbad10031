"""Templates render as promptsource's do."""

import json
import pickle
from collections import Counter

import pytest

from metro.data.jsonl_rows import JsonlRows
from metro.data.prompts.limits import TemplateError
from metro.data.prompts.sandbox import compile_source
from metro.data.prompts.templates import (
    PromptTemplate,
    TemplateTree,
    find_templates,
    read_templates,
)

YAML = """
dataset: toy
subset: small
templates:
  a-1: !Template
    answer_choices: No ||| Yes
    id: a-1
    jinja: '{{text}}

      Is it good? ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: is it/good?
    reference: ''
"""


def template(jinja: str, choices: str | None = None) -> PromptTemplate:
    return PromptTemplate("toy", None, "made", jinja, choices)


def toy_tree(folder, text=YAML):
    (folder / "toy/small").mkdir(parents=True)
    (folder / "toy/small/templates.yaml").write_text(text)
    return TemplateTree(folder)


def test_all_templates_equal_recorded_renderings(golden, tree):
    """Oracle: strings that the original implementation made of real rows."""
    compared = 0
    for line in (golden / "flipped/formats.jsonl").open():
        case = json.loads(line)
        subset = None if case["dataset"] == "anli" else case["subset"]
        one = tree.template(case["dataset"], subset, case["template"])
        assert (one.metrics, one.original_task) == (tuple(case["metrics"]), case["original_task"])
        # The recorder pinned the random filter to the first item.
        made = one.render(case["row"], seed=None)
        assert made.choices == case["answer_choices"]
        if case["direct_input"] is not None:
            assert made[:2] == (case["direct_input"], case["direct_target"])
            compared += 1
        if case["gold_label"] is not None:
            assert made.choices[made.label] == case["gold_label"]
    assert compared > 380


def test_all_576_templates_parse_and_have_a_task_name_of_their_own(testdata, tree):
    """Oracle: the manifest of the tree."""
    counts = Counter()
    names = set()
    for key in tree.datasets():
        for one in tree.templates(*key):
            compile_source(one.jinja)
            compile_source(one.answer_choices or "")
            counts[key] += 1
            names.add(one.task_name)
            assert pickle.loads(pickle.dumps(one)) == one
    manifest = json.loads((testdata / "prompts/MANIFEST.json").read_text())
    assert counts == {
        (item["name"], item["subset"]): item["templates"] for item in manifest["templates"]
    }
    assert sum(counts.values()) == len(names) == 576


def test_every_template_renders_rows_of_every_dataset_at_hand(testdata, tree):
    """Claim: the only missing fields are those that the data's manifest declares missing."""
    seen, missing = set(), set()
    for dataset, subset in tree.datasets():
        folder = testdata / "data" / dataset
        for file in sorted(folder.glob("*/*.jsonl")):
            if subset and file.parent.name != subset:
                continue
            rows = JsonlRows(file, limit=8)
            for one in tree.templates(dataset, subset):
                for number, row in enumerate(rows):
                    made = one.render(row, seed=number)
                    assert made.input or made.target is None
                    missing |= {(dataset, field) for field in made.missing}
            seen.add((dataset, subset))
    assert missing == {("wiqa", "metadata_question_type")}
    assert len(seen) > 50


def test_tree_reads_names_tags_and_metadata(tmp_path):
    tree = toy_tree(tmp_path)
    assert tree.datasets() == [("toy", "small")]
    (one,) = tree.templates("toy", "small")
    assert one.task_name == "toy_small_is_it_good_"
    assert one.metrics == ("Accuracy",) and one.original_task and one.choices_in_prompt
    assert one.render({"text": "Fine.", "label": 1})[:3] == (
        "Fine.\nIs it good?",
        "Yes",
        ["No", "Yes"],
    )


def test_values_are_cut_at_2048_characters_at_a_word():
    """Oracle: Jinja's own truncate, as promptsource appends it to every expression."""
    row = {"text": "word " * 1000}
    made = template("{{ text }}|||{{ 'a ' ~ text }}", "{{ text }} ||| b").render(row)
    assert made.input.endswith("...") and 2000 < len(made.input) <= 2048
    assert made.target == f"a {made.input.removesuffix(' word...')}..."
    assert made.choices == [row["text"].strip(), "b"]  # not cut
    assert template("{{ text }}").render({"text": "x" * 2050}).input == "x" * 2050  # the leeway


def test_text_of_a_template_reaches_the_model_as_it_is_written():
    """Oracle: plain Jinja. The cut of values concerns none of these."""
    row = {"k": 1, "text": "t", "pair": [3, 4]}
    for jinja, expected in {
        'Reply {"a": {"b": 1}} or {"a": {}}: {{text}}': 'Reply {"a": {"b": 1}} or {"a": {}}: t',
        "{{ k == 1 }} {{ not k }} {{ k + 1 }}": "True False 2",
        "{{ text -}}   !": "t!",
        "{{ {'a': {'b': text}}.a.b }}": "t",
        "{{ text if k }} {{ 'no' if not k }}.": "t .",
        "{{ '}}' }}{{ '{{' }}": "}}{{",
        "{{ pair }}": "[3, 4]",
        "{% set x %}{{ text }}}}{% endset %}{{ x }}": "t}}",
    }.items():
        assert template(jinja + " ||| x").render(row).input == expected, jinja


def test_format_writes_numbers_as_printf_does():
    """Oracle: Python's own operator."""
    row = {"score": 0.4321, "word": "so", "n": 7}
    jinja = "{{ '%.1f' | format(score) }} {{ '%s-%03d%%' | format(word, n) }} ||| {{n}}"
    made = template(jinja).render(row)
    assert made.input == "0.4 so-007%" and made.missing == ()
    assert template("{{ '%(a)s' | format(a=word) }}").render(row).input == "so"
    assert template("{{ '%s' | format(gone) }}").render(row).missing == ("gone",)


def test_bars_inside_data_split_nothing():
    row = {"text": "a ||| b", "options": ["x ||| y", "z"], "label": 0}
    one = template(
        "{{text}} {{options[0]}}? ||| {{answer_choices[label]}}", '{{options | join("|||")}}'
    )
    made = one.render(row)
    assert made.input == "a ||| b x ||| y?"
    assert (made.target, made.choices, made.label) == ("x ||| y", ["x ||| y", "z"], 0)


def test_no_answer_part_gives_no_target():
    one = template("{% if kind == 'a' %}{{text}} ||| yes{% endif %}")
    assert one.render({"kind": "a", "text": "t"})[:2] == ("t", "yes")
    assert one.render({"kind": "b", "text": "t"})[:2] == ("", None)


def test_choice_draws_by_seed_and_never_globally():
    import random

    one = template("{{ [1, 2, 3, 4, 5, 6, 7, 8] | choice }}{{ [1, 2, 3, 4] | choice }}|||x")
    state = random.getstate()
    drawn = [one.render({}, seed=seed).input for seed in range(50)]
    assert random.getstate() == state
    assert drawn == [one.render({}, seed=seed).input for seed in range(50)]
    assert len(set(drawn)) > 15
    assert one.render({}, seed=None).input == "11"
    # The same draws for the same seed in any other text of the template.
    assert one.render_text("{{ [1, 2, 3, 4, 5, 6, 7, 8] | choice }}", {}, seed=7) == drawn[7][0]


def test_most_frequent_and_zip_are_promptsources():
    row = {"items": ["b", "a", "b", "a", "c"]}
    assert template("{{ items | most_frequent | join(',') }}").render(row).input == "b,a"
    assert template("{% for a, b in zip([1, 2], [3, 4]) %}{{a}}{{b}} {% endfor %}").render(
        {}
    ).input == ("13 24")


def test_label_beyond_the_options_is_an_error_not_the_last_option():
    one = template("{{text}} ||| {{answer_choices[label]}}", "no ||| yes")
    with pytest.raises(ValueError, match="'made' of toy answer_choices has 2 entries and none at"):
        one.render({"text": "t", "label": 2})
    for label in (-1, None, ""):
        with pytest.raises(ValueError, match=f"'made' of toy label is {label!r}"):
            one.render({"text": "t", "label": label})
    for label in ("1", 0.5):
        with pytest.raises(ValueError, match=f"is read at {label!r}, which is not a whole number"):
            one.render({"text": "t", "label": label})


def test_label_is_the_option_that_the_answer_came_from():
    same = template("{{t}} ||| {{answer_choices[label]}}", "a ||| b ||| a")
    assert same.render({"t": "t", "label": 2}).label == 2
    longer = template("{{t}} ||| {{answer_choices[label]}} review.", "negative ||| positive")
    assert longer.render({"t": "t", "label": 1}).label == 1
    two = template("{{t}} ||| {{answer_choices[0]}} and {{answer_choices[1]}}", "a ||| b")
    assert two.render({"t": "t"}).label is None
    other = template("{{t}} ||| {{word}}", "a ||| b")
    assert other.render({"t": "t", "word": "c"}).label is None
    assert other.render({"t": "t", "word": "b"}).label == 1


@pytest.mark.parametrize("word", ["unknown", "not", "Nobody says no.", "no!"])
def test_an_answer_that_is_no_option_is_not_the_option_whose_letters_it_has(word):
    """Oracle: the options are "yes" and "no" alone."""
    for jinja in (
        "{{answer_choices[0]}} or {{answer_choices[1]}}? ||| {{word}}",
        "{{t}} ||| {% if answer_choices[1] == word %}{{answer_choices[1]}}{% endif %}{{word}}",
    ):
        made = template(jinja, "yes ||| no").render({"t": "t", "word": word})
        whole_word = "if" in jinja and "no" in word.replace("!", "").replace(".", "").split()
        assert made.label == (1 if whole_word else None), jinja


def test_a_template_that_changes_a_list_leaves_the_row_alone():
    row = {"words": ["a", "b"]}
    one = template("{% if words.append('c') %}{% endif %}{{ words | join(' ') }} ||| x")
    assert [one.render(row).input for _ in range(2)] == ["a b c", "a b c"]
    assert row == {"words": ["a", "b"]}


def test_missing_fields_are_named():
    made = template("{{text}} {{other}} ||| {{row.inner}}").render({"text": "t", "row": {}})
    assert made.missing == ("other", "inner")
    assert template("{% if other is defined %}x{% endif %}t").render({}).missing == ()
    for condition in ("label == 0", "label != 1", "1 == label", "label in [0, 1]", "label"):
        # Without the note the row would be given the other answer.
        one = template("t ||| {% if " + condition + " %}yes{% else %}no{% endif %}")
        assert one.render({}).missing == ("label",), condition
        assert one.render({"label": 1}).missing == ()


def test_nulls_and_items_that_are_not_there_are_missing_as_well():
    """Oracle: by hand. Where a template asks for null, it is no text that the prompt lacks."""
    row = {"a": None, "nan": float("nan"), "text": "None", "words": [], "d": {"x": None}}
    for jinja, missing in {
        "{{a}} {{text}}": ("a",),
        "{{nan}}{{d.x}}": ("nan", "d.x"),
        "{{ words[0] }}": ("item 0",),
        "{{ words | first }}": ("item",),
        "{{ [text, a] | join(' ') }}": ("value (it is null)",),
        "{{ a | upper }}{{ text ~ a }}": ("value (it is null)",),
        "{{ '%s' | format(a) }}{{ a | capitalize }}": ("value (it is null)",),
        "{{ a | int }}{{ a | float }}": ("number (it is None)",),
        "{{ a | int(7) }}{{ '3x' | int(7) }}{{ '3.5' | int }}": (),
        "{% if a is none %}x{% endif %}{{ a or text }}": (),
    }.items():
        assert template(jinja + "t ||| x").render(row).missing == missing, jinja
    assert template("t ||| x", "{{a}} ||| b").render(row).missing == ("a",)
    for jinja, problem in {
        "{{ text | int }}": "'None' is not a number",
        "{{b}}": "prints bytes",
    }.items():
        with pytest.raises(TemplateError, match=problem):
            template(jinja).render({**row, "b": b"x"})


def test_yaml_tags_run_no_code(tmp_path):
    for tag in ("!!python/object/apply:os.system ['true']", "!Other {}"):
        with pytest.raises(ValueError, match="not a file of templates"):
            toy_tree(tmp_path / tag[:5].strip("!"), f"templates: {tag}\n").templates("toy", "small")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "no mapping `templates`"),
        ("templates: {x: {name: a}}\n", "has no text `jinja`"),
        ("templates: {x: {name: a, jinja: b, answer_choices: [c]}}\n", "is a list, not a text"),
        ("templates: {x: {name: a, jinja: b}, y: {name: a, jinja: b}}\n", "two templates named"),
        ("templates: {x: {name: a, jinja: b, metadata: 3}}\n", "metadata without fields"),
        ("templates: {x: &a [*a", "not a file of templates"),
        ("templates: " + "[" * 100_000, "nests too deeply"),
        (
            "a: &a0 [x, x]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
            + "templates: {x: {name: a, jinja: b, metadata: {metrics: [*a39]}}}\n",
            "`metrics` is a list, not a text",
        ),
    ],
)
def test_bad_template_file_is_named(tmp_path, text, message):
    (tmp_path / "templates.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_templates(tmp_path / "templates.yaml", "d")


def test_wrong_names_are_answered_with_similar_ones(tmp_path, monkeypatch):
    tree = toy_tree(tmp_path)
    with pytest.raises(ValueError, match="no templates for toy/smal .*did you mean 'toy/small'"):
        tree.templates("toy", "smal")
    with pytest.raises(ValueError, match="no template 'is it good': did you mean 'is it/good"):
        tree.template("toy", "small", "is it good")
    monkeypatch.setenv("METRO_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("METRO_TEMPLATES", raising=False)
    with pytest.raises(ValueError, match="metro templates fetch"):
        find_templates()
    monkeypatch.setenv("METRO_TEMPLATES", str(tmp_path))
    assert find_templates().datasets() == [("toy", "small")]
    with pytest.raises(ValueError, match="no folder of templates at .*--templates"):
        find_templates(tmp_path / "missing")


def test_row_with_a_field_answer_choices_is_refused():
    with pytest.raises(ValueError, match="rename it"):
        template("{{text}}").render({"text": "t", "answer_choices": []})
