"""Templates render as promptsource's do; what a template may cost is bounded."""

import json
import pickle
import resource
import time
from collections import Counter

import pytest

from metro.data.jsonl_rows import JsonlRows
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
        made = one.render_example(case["row"], seed=None)
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
                    made = one.render_example(row, seed=number)
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
    assert one.render_example({"text": "Fine.", "label": 1})[:3] == (
        "Fine.\nIs it good?",
        "Yes",
        ["No", "Yes"],
    )


def test_values_are_cut_at_2048_characters_at_a_word():
    """Oracle: Jinja's own truncate, applied by hand to the last operand as promptsource does."""
    long = "word " * 1000
    made = template("{{ text }}|||{{ 'a ' ~ text }}").render_example({"text": long})
    assert made.input.endswith("...") and 2000 < len(made.input) <= 2048
    assert made.target == ("a " + made.input)
    assert (
        template("{{ text }}").render_example({"text": "x" * 2050}).input == "x" * 2050
    )  # Jinja's leeway


def test_bars_inside_data_split_nothing():
    row = {"text": "a ||| b", "options": ["x ||| y", "z"], "label": 0}
    one = template(
        "{{text}} {{options[0]}}? ||| {{answer_choices[label]}}", '{{options | join("|||")}}'
    )
    made = one.render_example(row)
    assert made.input == "a ||| b x ||| y?"
    assert (made.target, made.choices, made.label) == ("x ||| y", ["x ||| y", "z"], 0)


def test_no_answer_part_gives_no_target():
    one = template("{% if kind == 'a' %}{{text}} ||| yes{% endif %}")
    assert one.render_example({"kind": "a", "text": "t"})[:2] == ("t", "yes")
    assert one.render_example({"kind": "b", "text": "t"})[:2] == ("", None)


def test_choice_draws_by_seed_and_never_globally():
    import random

    one = template("{{ [1, 2, 3, 4, 5, 6, 7, 8] | choice }}{{ [1, 2, 3, 4] | choice }}|||x")
    state = random.getstate()
    drawn = [one.render_example({}, seed=seed).input for seed in range(50)]
    assert random.getstate() == state
    assert drawn == [one.render_example({}, seed=seed).input for seed in range(50)]
    assert len(set(drawn)) > 15
    assert one.render_example({}, seed=None).input == "11"
    # The same draws for the same seed in any other text of the template.
    assert one.render_text("{{ [1, 2, 3, 4, 5, 6, 7, 8] | choice }}", {}, seed=7) == drawn[7][0]


def test_most_frequent_and_zip_are_promptsources():
    row = {"items": ["b", "a", "b", "a", "c"]}
    assert template("{{ items | most_frequent | join(',') }}").render_example(row).input == "b,a"
    assert template("{% for a, b in zip([1, 2], [3, 4]) %}{{a}}{{b}} {% endfor %}").render_example(
        {}
    ).input == ("13 24")


def test_label_beyond_the_options_is_an_error_not_the_last_option():
    one = template("{{text}} ||| {{answer_choices[label]}}", "no ||| yes")
    with pytest.raises(ValueError, match="'made' of toy answer_choices has 2 entries and none at"):
        one.render_example({"text": "t", "label": -1})
    with pytest.raises(ValueError, match="none at 2"):
        one.render_example({"text": "t", "label": 2})
    for label in ("1", 1.0, None):
        with pytest.raises(ValueError, match=f"is read at {label!r}, which is not a whole number"):
            one.render_example({"text": "t", "label": label})


def test_label_is_the_option_that_the_answer_came_from():
    same = template("{{t}} ||| {{answer_choices[label]}}", "a ||| b ||| a")
    assert same.render_example({"t": "t", "label": 2}).label == 2
    longer = template("{{t}} ||| {{answer_choices[label]}} review.", "negative ||| positive")
    assert longer.render_example({"t": "t", "label": 1}).label == 1
    other = template("{{t}} ||| {{word}}", "a ||| b")
    assert other.render_example({"t": "t", "word": "c"}).label is None
    assert other.render_example({"t": "t", "word": "b"}).label == 1


def test_a_template_that_changes_a_list_leaves_the_row_alone():
    row = {"words": ["a", "b"]}
    one = template("{% if words.append('c') %}{% endif %}{{ words | join(' ') }} ||| x")
    assert [one.render_example(row).input for _ in range(2)] == ["a b c", "a b c"]
    assert row == {"words": ["a", "b"]}


def test_missing_fields_are_named():
    made = template("{{text}} {{other}} ||| {{row.inner}}").render_example({"text": "t", "row": {}})
    assert made.missing == ("other", "inner")
    assert template("{% if other is defined %}x{% endif %}t").render_example({}).missing == ()
    for condition in ("label == 0", "label != 1", "1 == label", "label in [0, 1]", "label"):
        # Without the note the row would be given the other answer.
        one = template("t ||| {% if " + condition + " %}yes{% else %}no{% endif %}")
        assert one.render_example({}).missing == ("label",), condition
        assert one.render_example({"label": 1}).missing == ()


GROW = "{% set a = ['x'] %}{% set b = ['x'] %}" + "{% set a = [a, a] %}{% set b = [b, b] %}" * 45
FILL = (
    "{% set b = [] %}{% for i in range(99999) %}{% if items.append(b) %}{% endif %}{% endfor %}"
    "{% for i in range(19) %}{% if b.append('a' * 900000) %}{% endif %}{% endfor %}"
)
HOSTILE = {
    "class": "{{ ''.__class__ }}",
    "class through item": "{{ ''['__class__'] }}",
    "class through made name": "{{ text['__cl' ~ 'ass__'] }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ range.__globals__ }}",
    "attribute filter": "{{ text | attr('__class__') }}",
    "map with attribute": "{{ [text] | map(attribute='__class__') | list }}",
    "map to a forbidden filter": "{{ [text] | map('format') | list }}",
    "format": "{{ '{0.__class__}'.format(text) }}",
    "format of width": "{{ '{:1000000000}'.format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "undefined function": "{{ open('x') }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "self": "{{ self.__init__ }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "endless growth": "{% for x in items %}{% if items.append(1) %}{% endif %}{% endfor %}",
    "endless growth of a dict": "{% for x in range(99999) %}{% if d.update({x: text * 999}) %}"
    "{% endif %}{% endfor %}",
    "other mutation": "{{ items.clear() }}",
    "list in itself": "{% if items.append(items) %}{% endif %}{{ items }}",
    "repeat a text": "{{ ('a' * 10**9) }}",
    "repeat twice": "{{ ('a' * 900000 * 900000) }}",
    "repeat a list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ (10 ** (10 ** 10)) }}",
    "power of numbers": "{{ (9 ** 99999999) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'a' | indent(1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "range": "{{ range(10**9) | list }}",
    "loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "quiet nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set x = i == j %}{% endfor %}{% endfor %}",
    "doubling": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "doubling by plus": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
    "doubling a list": "{% set a = [1] %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
    "shared lists": "{% set a = ['aaaaaaaaaa'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ ('a' * 99999).join(range(99999) | map('string')) }}",
    "join filter": "{{ range(99999) | join('a' * 99999) }}",
    "concatenate": "{% set a = 'a' * 900000 %}{{ " + " ~ ".join(["a"] * 2000) + " }}",
    "print in a loop": "{% for i in range(99999) %}{{ ('a' * 9999) }}{% endfor %}",
    "block set": "{% set a %}" + "{{ text }}" * 9000 + "{% endset %}" + "{% set a = a ~ a %}" * 60,
    "sort": "{{ range(99999) | map('string') | sort | join | length }}" * 500,
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 150 + "]" * 150 + " }}",
    "long source": "x" * 200_000,
    "not closed": "{% if a %}",
    "shared lists compared": GROW + "{% if a == b %}x{% endif %}",
    "shared lists tested": GROW + "{% if a is eq(b) %}x{% endif %}",
    "shared tuples as a key": "{% set a = ('x', 'y') %}"
    + "{% set a = (a, a) %}" * 45
    + "{{ {a: 1} | length }}",
    "tuples of zip as a key": "{% set n = namespace(a=('x', 'y')) %}{% for i in range(45) %}"
    "{% for t in zip([n.a], [n.a]) %}{% set n.a = t %}{% endfor %}{% endfor %}"
    "{{ {n.a: 1} | length }}",
    "many slices": "{% set a = 'a' * 900000 %}{% for i in range(99999) %}"
    "{% if items.append(a[i:]) %}{% endif %}{% endfor %}",
    "slices at once": "{% set a = 'a' * 900000 %}{{ " + " ~ ".join(["a[1:]"] * 5000) + " }}",
    "plain text in a loop": "{% for i in range(99999) %}" + "x" * 90_000 + "{% endfor %}",
    "strip": "{{ ('a' * 900000).strip('b' * 900000 ~ 'a') }}",
    "trim": "{{ ('a' * 900000) | trim('b' * 900000 ~ 'a') }}",
    "search from the right": "{{ ('a' * 900000).rfind('ab' ~ 'a' * 450000) }}",
    "split from the right": "{{ ('a' * 900000).rsplit(sep='ab' ~ 'a' * 450000) | length }}",
    "numbers of one hash": "{% for i in range(99999) %}"
    "{% if items.append(i * 2305843009213693951) %}{% endif %}{% endfor %}"
    "{{ items | unique | list | length }}",
    "complex numbers": "{% for i in range(99999) %}{% if items.append((-4) ** 0.5) %}{% endif %}"
    "{% endfor %}",
    "views of a dict": FILL + "{% set c = {1: items} %}{{ [c.values()] }}",
    "namespace": FILL + "{% set n = namespace(a=items) %}{{ [n] }}",
    "raw": "{% raw %}" + "{{" * 40_000 + "{% endraw %}",
    "failed assertion": "{{ 'abcdefgh' | truncate(1, end='.....') }}",
    "dict changed while read": "{% for k in {'a': 1} %}{% endfor %}{% for k in e %}"
    "{% if e.update({k ~ 'x': 1}) %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_within_time_and_memory(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(ValueError, match="template 'made' of toy") as caught:
        template(HOSTILE[name]).render_example(
            {"text": "some text", "items": [1], "d": {}, "e": {"a": 1}}
        )
    assert "TypeError" not in str(caught.value)  # refused, not written wrongly
    assert time.process_time() - start < 12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.mark.parametrize(
    "choices", ["{{ 'a' * 10**9 }}", "{% set a = 'a' * 900000 %}" + "{{ a }}" * 2000]
)
def test_hostile_answer_choices_are_refused_too(choices):
    """They are not cut at 2048 characters."""
    with pytest.raises(ValueError, match="template 'made' of toy"):
        template("{{text}} ||| x", choices).render_example({"text": "t"})


def test_bounds_leave_room_for_large_rows():
    """A row like wiki_hop's largest: hundreds of kilobytes of passages."""
    passages = ["many words of a passage. " * 200] * 60
    jinja = "{% for s in supports %}{{ s }}\n{% endfor %}{{ supports | join(' ') }} ||| {{ a }}"
    made = template(jinja).render_example({"supports": passages, "a": "answer"})
    assert made.target == "answer" and made.input.count("many words") > 60 * 70


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
        template("{{text}}").render_example({"text": "t", "answer_choices": []})
