"""Suites as data.

Oracles: the published lists of templates and subjects, and the paper's counts.
"""

import json

import pytest

from metro.evaluation.tasks.suites import find_suite, read_suite, suite_names
from metro.utils.messages import UserError

COUNTS = {
    "rte": 10, "cb": 15, "anli_r1": 15, "anli_r2": 15, "anli_r3": 15, "wsc": 10, "winogrande": 5,
    "copa": 8, "story_cloze": 5, "hellaswag": 4, "wic": 10,
}  # fmt: skip


def test_t0_has_the_templates_of_metro_t0(testdata):
    """Oracle: the published list, dataset by dataset."""
    published = json.loads((testdata / "mixtures" / "t0_eval_templates.json").read_text())
    tasks = find_suite("t0").tasks
    assert {name: len(spec.prompts) for name, spec in tasks.items()} == COUNTS
    listed = {(e["dataset"], e["subset_or_split"]): e["templates"] for e in published}
    assert len(listed) == len(tasks)
    for spec in tasks.values():
        key = spec.split if spec.dataset == "anli" else spec.subset
        found = listed.get((spec.dataset, key)) or listed[spec.dataset, None]
        assert list(spec.prompts) == found


def test_other_suites_have_the_papers_sizes(testdata):
    """Oracle: 14 sets and 14 BIG-bench tasks of FLIPPED, 57 subjects, 5 pairs."""
    tasks = find_suite("flipped14").tasks
    assert len(tasks) == 14
    counts = {name: len(tasks[name].prompts) for name in ("piqa", "arc_challenge", "openbookqa")}
    assert counts == {"piqa": 7, "arc_challenge": 5, "openbookqa": 7}
    assert len(find_suite("bigbench").tasks) == 14
    assert len(find_suite("bigbench").tasks["conceptual_combinations"].prompts) == 6
    sizes = json.loads((testdata / "mixtures" / "mmlu_validation_sizes.json").read_text())
    assert set(find_suite("mmlu").tasks) == set(sizes)
    assert len(find_suite("label_generalization").tasks) == 5
    names = ["bigbench", "blimp", "flipped14", "label_generalization", "mmlu", "t0"]
    assert suite_names() == names


def test_every_prompt_of_every_suite_is_a_template_with_options(testdata):
    """Oracle: promptsource's tree."""
    from metro.data.prompts.templates import TemplateTree

    tree = TemplateTree(testdata / "prompts")
    for name in ("t0", "flipped14", "mmlu", "label_generalization"):
        for spec in find_suite(name).tasks.values():
            place = (spec.template.get("dataset", spec.dataset),
                     spec.template.get("subset", spec.subset))  # fmt: skip
            for prompt in spec.prompts:
                assert tree.template(*place, prompt).answer_choices


def test_narrowing_keeps_the_named_and_refuses_the_unknown():
    """Oracle: by hand."""
    suite = find_suite("t0")
    assert list(suite.narrowed(["wic", "rte"]).tasks) == ["rte", "wic"]
    chosen = suite.narrowed(prompts=["must be true"])
    assert list(chosen.tasks) == ["rte", "cb", "anli_r1", "anli_r2", "anli_r3"]
    assert chosen.tasks["cb"].prompts == ("must be true",)
    with pytest.raises(ValueError, match="no task 'rta': did you mean 'rte'"):
        suite.narrowed(["rta"])
    with pytest.raises(ValueError, match="prompt 'mustbe true': did you mean 'must be true'"):
        suite.narrowed(["rte"], ["mustbe true"])
    with pytest.raises(ValueError, match="no suite 't1': did you mean 't0'"):
        find_suite("t1")
    with pytest.raises(ValueError, match="no suite 'zzz': known: .*, t0. A file NAME.yaml or"):
        find_suite("zzz")
    with pytest.raises(ValueError, match="no suite file none.yaml"):
        find_suite("none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [", "is not YAML"),
        ("title: schön", "is not YAML: 'utf-8' codec can't decode"),
        ("title: x", "has no `tasks:`"),
        ("kind: quiz\ntasks: {a: {}}", "kind is 'quiz'; use one of templates"),
        ("tasks: {a: {dataset: d, split: s}}", "task a: missing key 'prompts'; see .Own tasks."),
        ("tasks: {a: {dataset: d, prompts: [p]}}", "task a: missing key 'split'"),
        ("tasks: {a: {dataset: d, prompt: [p]}}", "unknown key 'prompt': did you mean 'prompts'"),
        ("tasks: {a: {dataset: d, split: 1, prompts: [p]}}", "split is 1, and must be a text"),
        ("tasks: {a: {dataset: d, split: s, prompts: [1]}}", "prompts has 1, and must be a"),
        ("tasks: {a: }", "task a is None, and must be a mapping"),
        ("tasks: {a: {data: d.jsonl, prompts: {p: 3}}}", "prompt 'p' is 3, and must be a mapping"),
        ("kind: mmlu\ntasks: [a]", "mine.yaml: missing key 'template'"),
        ("kind: bigbench\ntasks: {a: 7}", "subtasks is 7, and must be a list"),
        (
            "kind: label_generalization\n"
            "tasks: {a: {dataset: d, split: s, template: t, replace: {Yes: Agree}}}",
            "replace is {True: 'Agree'}, and must map texts to texts",
        ),
        ("kind: prepared", "missing key 'folder'"),
        (
            "tasks: {a: {data: d.jsonl, prompts: {p: {jinja: 'x'}}}}",
            "prompt 'p': missing key 'answer_choices'",
        ),
        (
            "tasks: {a: {data: d.jsonl, prompts: {p: {jinja: 'x', answer_choices: 'y'}}}}",
            "'p' has no answer: write it behind",
        ),
        ("tasks: {a: {data: d.jsonl, prompts: []}}", "task a has no prompts"),
        (
            "tasks: {a: {data: d, prompts: {p: {jinja: x, answer_choices: no}}}}",
            "is False, and mus",
        ),
        ("tasks: {a: {dataset: d, split: s, prompts: [p, p]}}", "task a: prompts names 'p' twice"),
        ("kind: mmlu\ntasks: [a, b, a]", "tasks names 'a' twice"),
        ("kind: mmlu\ntasks: [a, 2020-01-01]", "tasks has datetime.date"),
        ("tasks: {a: {}, b: {}, a: {}}", "line 1: the key 'a' is there twice"),
        ("title: [a]\ntasks: {a: {}}", "title is .'a'., and must be a text"),
        ("include: t0\ntasks: {a: {}}", "include is 't0', and must be a list"),
    ],
)
def test_bad_suite_files_are_refused(tmp_path, text, message):
    """Oracle: the message names file, task and field."""
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as error:
        read_suite(path)
    assert "mine.yaml" in str(error.value)


def test_a_suite_does_not_include_itself(tmp_path, monkeypatch):
    """Oracle: by hand: itself, through another one, and twice the same, which is no circle."""
    monkeypatch.chdir(tmp_path)
    own = "tasks: {%s: {dataset: d, split: s, prompts: [p]}}"
    for name, includes in [("a", "a"), ("b", "c"), ("c", "b"), ("d", ""), ("e", "d"), ("f", "d")]:
        line = f"include: [{includes}.yaml]\n" if includes else ""
        (tmp_path / f"{name}.yaml").write_text(line + own % name)
    with pytest.raises(UserError, match="a.yaml includes a.yaml: a suite in itself"):
        find_suite("a.yaml")
    with pytest.raises(UserError, match="b.yaml includes c.yaml includes b.yaml: a suite in"):
        find_suite("./b.yaml")
    (tmp_path / "g.yaml").write_text("include: [e.yaml, f.yaml]\n" + own % "g")
    assert list(find_suite("g.yaml").tasks) == ["d", "e", "f", "g"]
