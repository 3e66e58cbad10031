"""The mixtures are the published ones."""

import csv
import json

import pytest

from metro.data.datasets import name_of
from metro.data.prompts.mixtures import find_mixture, mixture_names

# Facts about the published FLIPPED training set: templates per dataset.
FLIPPED = {
    "glue/qqp": 6, "paws/labeled_final": 11, "glue/mrpc": 5, "ag_news": 7, "dbpedia_14": 4,
    "imdb": 11, "amazon_polarity": 9, "rotten_tomatoes": 10, "yelp_review_full": 7,
    "cos_e/v1.11": 6, "dream": 2, "quail": 13, "quartz": 8, "social_i_qa": 5, "wiqa": 4,
    "cosmos_qa": 12, "qasc": 8, "quarel": 5, "sciq": 5, "app_reviews": 2,
}  # fmt: skip


def tasks_of(mixture, tree) -> list[str]:
    return [t.task_name for names in mixture.datasets for t in mixture.templates(tree, *names)]


GROUPS = {
    "t0": ["BASE"],
    "t0p": ["BASE", "GPT_EVAL"],
    "t0pp": ["BASE", "GPT_EVAL", "SGLUE"],
    "t0_train_eval": ["BASE"],
}
"""Groups of the published table that each mixture takes."""


def test_members_are_the_published_ones(testdata, tree):
    """Oracle: the published table and lists, applied to all templates by hand."""
    for name, groups in GROUPS.items():
        check_members(testdata, tree, name, groups)


def check_members(testdata, tree, name: str, groups: list[str]) -> None:
    blacklists = json.loads((testdata / "mixtures/blacklists.json").read_text())
    wanted = set()
    with (testdata / "mixtures/t0_datasets.csv").open() as file:
        members = [(row["HF_name"], row["subset"] or None)
                   for row in csv.DictReader(file) if row["do_train"] in groups]  # fmt: skip
    for dataset in members:
        for template in tree.templates(*dataset):
            task = template.task_name
            if task in blacklists["task_blacklist"]:
                continue
            if name == "t0_train_eval" and (
                not template.original_task
                or task in blacklists["d4_train_score_eval_task_blacklist"]
                or any(part in task for part in blacklists["d4_train_skip_eval"])
            ):
                continue
            wanted.add(task)
    mixture = find_mixture(name)
    assert set(mixture.datasets) == set(members)
    assert sorted(tasks_of(mixture, tree)) == sorted(wanted)
    assert mixture.fold_whitespace and mixture.cap_of == "template"
    if name != "t0_train_eval":
        assert mixture.validation == "t0_train_eval"


def test_blacklist_has_the_24_published_tasks(testdata):
    blacklists = json.loads((testdata / "mixtures/blacklists.json").read_text())
    assert find_mixture("t0").excluded_tasks == frozenset(blacklists["task_blacklist"])
    assert len(find_mixture("t0").excluded_tasks) == 24


def test_flipped_has_20_datasets_and_140_templates(tree):
    mixture = find_mixture("flipped")
    counts = {name_of(*d): len(mixture.templates(tree, *d)) for d in mixture.datasets}
    assert counts == FLIPPED and sum(counts.values()) == 140
    assert not mixture.fold_whitespace and mixture.needs_choices


def test_flipped_leaves_out_what_the_original_leaves_out(golden, tree):
    """Oracle: its own filter, recorded per template."""
    mixture = find_mixture("flipped")
    for line in (golden / "flipped/formats.jsonl").open():
        case = json.loads(line)
        if case["kind"] == "train":
            template = tree.template(case["dataset"], case["subset"], case["template"])
            left_out = mixture.reason_to_leave_out(template) is not None
            assert left_out == case["excluded_by_original"], case["template"]


def test_caps_are_shared_by_the_templates_of_a_dataset():
    """Oracle: 500,000 // templates, and FLIPPED's 500,000 per dataset."""
    assert [find_mixture("t0").cap_per_template(n) for n in (1, 7, 18)] == [500_000, 71_428, 27_777]
    assert find_mixture("flipped").cap_per_template(7) == 500_000


def test_names_are_found_in_every_spelling():
    for name in ("t0+", "T0P", "t0p"):
        assert find_mixture(name).name == "t0p"
    assert find_mixture("t0-train-eval").name == "t0_train_eval"
    assert find_mixture("flipped20").name == "flipped"
    assert mixture_names() == ["t0", "t0p", "t0pp", "t0_train_eval", "flipped"]


def test_narrowing_keeps_order_and_rules():
    mixture = find_mixture("t0").narrowed(["trec", "ag_news"])
    assert mixture.datasets == (("ag_news", None), ("trec", None))
    assert mixture.name == "t0" and mixture.validation == "t0_train_eval"
    with pytest.raises(ValueError, match="no dataset 'agnews': did you mean 'ag_news'"):
        find_mixture("t0").narrowed(["agnews"])


def test_own_mixture_from_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("datasets: [imdb, super_glue/rte]\ngroups: [flipped]\ncap: 10\n")
    mixture = find_mixture(file)
    assert mixture.name == "mine" and len(mixture.datasets) == 21  # imdb is in both
    assert mixture.cap_per_template(5) == 2 and mixture.cap_per_template(50) == 1


def test_earlier_spelling_of_datasets_is_read(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("datasets: [imdb]\ncap_of: dataset\n")
    wanted = find_mixture(file)
    file.write_text("data_sets: [imdb]\ncap_of: data_set\n")
    assert find_mixture(file) == wanted and wanted.cap_of == "dataset"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cap: 3\n", "names no datasets"),
        ("datasets: [a]\ncapp: 3\n", "unknown key 'capp': did you mean 'cap'"),
        ("datasets: [a]\ncap: 0\n", "cap is 0"),
        ("datasets: [a]\ncap_of: row\n", "cap_of is 'row'"),
        ("datasets: [a]\ngroups: [none]\n", "groups names 'none': there are t0, t0p"),
        ("datasets: imdb\n", "datasets is 'imdb', and must be a list of names"),
        ("datasets: [1, {a: b}]\n", "must be a list of names"),
        ("datasets: [a]\ncap: true\n", "cap is True, and must be a number"),
        ("datasets: [a]\nneeds_choices: 1\n", "needs_choices is 1, and must be true or false"),
        ("datasets: [a]\ndata_sets: [b]\n", "mean the same: join them"),
        ("a: [\n", "is not YAML"),
        ("a: ö\n", "is not YAML: 'utf-8' codec can't decode"),
    ],
)
def test_bad_mixture_file_is_refused(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        find_mixture(tmp_path / "m.yaml")
