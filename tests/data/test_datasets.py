"""Rows come from local jsonl or through the package datasets, under the templates' field names."""

import huggingface_hub
import pytest

from metro.data import datasets
from metro.data.datasets import (
    DatasetEntry,
    DatasetUnavailable,
    available_splits,
    dataset_table,
    load_rows,
)
from metro.data.own_rows import OwnData
from metro.data.prompts.mixtures import find_mixture
from metro.data.prompts.plan import make_plan, planned_sizes
from metro.data.settings import PreparePromptsSettings
from metro.utils import network
from metro.utils.messages import UserError
from tests.data.prompts.toys import YES_NO, files_of, prepare, write_rows, write_templates

ROWS = [{"text": f"text {i}", "label": i % 2, "nested": {"a": [i, i + 1]}} for i in range(7)]


@pytest.fixture
def table(monkeypatch):
    """A table of invented datasets in place of the published one."""
    entries: dict[str, DatasetEntry] = {}
    monkeypatch.setattr(datasets, "dataset_table", lambda: entries)
    return entries


def test_local_folder_is_found_by_subset_default_or_configuration(tmp_path, table):
    table["named"] = DatasetEntry(config="plain_text", splits=("train", "validation"))
    write_rows(tmp_path, "plain", "train", ROWS)
    write_rows(tmp_path, "sub", "train", ROWS, "s1")
    write_rows(tmp_path, "sub", "train", ROWS[:2], "s2")
    write_rows(tmp_path, "named", "validation", ROWS, "plain_text")
    write_rows(tmp_path, "named", "notes", ROWS, "plain_text")
    write_rows(tmp_path, "only", "dev", ROWS, "some_name")
    assert load_rows("plain", None, "train", data_dir=tmp_path)[2] == ROWS[2]
    assert len(load_rows("sub", "s2", "train", data_dir=tmp_path)) == 2
    assert len(load_rows("named", None, "validation", data_dir=tmp_path, limit=3)) == 3
    assert available_splits("named", None, data_dir=tmp_path) == ["validation"]
    assert available_splits("only", None, data_dir=tmp_path) == ["dev"]
    table["only"] = DatasetEntry(manual="ask for it")
    assert available_splits("only", None, data_dir=tmp_path) == ["dev"]
    for name, subset, message in (
        ("other", None, "write its rows as other/default/<split>.jsonl"),
        ("sub", "s3", "write its rows as sub/s3/<split>.jsonl"),
        ("sub", None, "write its rows as sub/default/<split>.jsonl"),
    ):
        with pytest.raises(DatasetUnavailable, match=message):
            load_rows(name, subset, "train", data_dir=tmp_path)
    with pytest.raises(DatasetUnavailable, match="no split 'test' in .* it has train"):
        load_rows("plain", None, "test", data_dir=tmp_path)
    with pytest.raises(DatasetUnavailable, match="is not a folder"):
        load_rows("plain", None, "train", data_dir=tmp_path / "none")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A dataset as on the hub: parquet files with a configuration, loaded by the real package."""
    package = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    (folder / "conf").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        package.Dataset.from_list(rows).to_parquet(folder / f"conf/{split}-0.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: conf\n  data_files:\n"
        "  - {split: train, path: conf/train-*}\n"
        "  - {split: validation, path: conf/validation-*}\n---\n"
    )
    return folder


def test_hub_rows_come_with_renamed_fields(repository, table):
    """Oracle: the rows that were written."""
    table["toy/sub"] = DatasetEntry(
        hub=str(repository), config="conf", splits=("train", "validation"), rename={"words": "text"}
    )
    expected = [{"label": r["label"], "nested": r["nested"], "words": r["text"]} for r in ROWS]
    rows = load_rows("toy", "sub", "train")
    assert [*rows] == expected and rows[2:5] == expected[2:5] and rows[0:0] == []
    assert len(load_rows("toy", "sub", "train", limit=2)) == 2
    assert available_splits("toy", "sub") == ["train", "validation"]
    with pytest.raises(DatasetUnavailable, match="no split 'test' with labels: it has train, val"):
        load_rows("toy", "sub", "test")
    first, total = datasets.peek("toy", "sub", "train", 2)
    assert (first, total) == (expected[:2], 7)
    assert available_splits(str(repository), "conf") == ["train", "validation"]  # not in the table


def test_mixture_from_the_hub_is_planned_and_prepared(repository, table, tmp_path):
    """Oracle: the same rows from a local folder."""
    entry = DatasetEntry(hub=str(repository), config="conf", splits=("train", "validation"))
    table["one"] = entry
    write_templates(tmp_path / "templates", "one", YES_NO)
    (tmp_path / "mix.yaml").write_text("datasets: [one]\n")
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        write_rows(tmp_path / "data", "one", split, rows)
    local, _ = prepare(tmp_path, tmp_path / "local")
    remote, _ = prepare(tmp_path, tmp_path / "remote", data_dir=None, num_workers=2)
    assert files_of(local.folder) == files_of(remote.folder)
    options = PreparePromptsSettings(
        mixture=str(tmp_path / "mix.yaml"), templates=tmp_path / "templates"
    )
    plan = planned_sizes(make_plan(options))
    assert [(line.side, line.rows, line.examples) for line in plan] == [
        ("train", 7, 21), ("valid", 3, 9),
    ]  # fmt: skip


def test_repository_with_a_script_falls_back_to_its_parquet_copy(repository, table, monkeypatch):
    """The main revision refuses as the package does for scripts; the copy is the real loading."""
    import datasets as package

    real, tried = package.load_dataset, []

    def load_dataset(path, name=None, *, split, revision=None, streaming=False):
        tried.append((name, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found toy.py")
        return real(path, "conf" if name == "default" else name, split=split)

    monkeypatch.setattr(package, "load_dataset", load_dataset)
    table["toy"] = DatasetEntry(hub=str(repository), config="other", splits=("train",))
    match = "RuntimeError: Dataset scripts are no longer.*; ValueError: .*'other'"
    with pytest.raises(DatasetUnavailable, match=match):
        load_rows("toy", None, "train")
    table["toy"] = DatasetEntry(hub=str(repository), config="old", splits=("train",), script=True)
    assert len(load_rows("toy", None, "train")) == 7
    assert tried[-2:] == [("old", "refs/convert/parquet"), ("default", "refs/convert/parquet")]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
def test_a_hub_that_fails_while_rows_are_read_is_one_line(repository, table, monkeypatch, error):
    import datasets as package

    def take(self, count):
        raise error("gone\naway")

    monkeypatch.setattr(package.IterableDataset, "take", take)
    table["toy"] = DatasetEntry(hub=str(repository), config="conf", splits=("train",))
    with pytest.raises(
        DatasetUnavailable, match=f"toy could not be .*: {error.__name__}: gone awa"
    ):
        datasets.peek("toy", None, "train", 2)


def test_unavailable_dataset_is_one_line_with_a_remedy(table, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setattr(network, "is_reachable", lambda address: True)
    table["toy"] = DatasetEntry(hub=str(tmp_path / "none"), splits=("train",), unsure=True)
    with pytest.raises(DatasetUnavailable) as caught:
        load_rows("toy", None, "train")
    message = str(caught.value)
    assert "\n" not in message and "--data-dir" in message and "could not be verified" in message
    table["story"] = DatasetEntry(hub="a/b", splits=("validation",), manual="ask for it")
    with pytest.raises(DatasetUnavailable, match="cannot be downloaded: ask for it"):
        load_rows("story", None, "validation")
    for name, message in (("toy", "could not be loaded from "), ("story", ": ask for it, ")):
        with pytest.raises(UserError, match=f"{message}.*give a file or folder of rows$") as caught:
            own = OwnData(name)  # whose commands have no --data-dir
            own.rows(own.splits[0])
        assert "data-dir" not in str(caught.value)


def test_table_knows_every_dataset_of_every_mixture(testdata):
    """Oracle: the published list, and the mixtures."""
    table = dataset_table()
    listed = (testdata / "mixtures/t0_datasets.csv").read_text().splitlines()[1:]
    names = {datasets.name_of(*(line.split(",")[:2])) for line in listed}
    assert names <= set(table)
    for mixture in ("t0pp", "flipped"):
        for dataset in find_mixture(mixture).datasets:
            entry = table[datasets.name_of(*dataset)]
            assert entry.hub.count("/") == 1 and "train" in entry.splits, dataset
    for name, entry in table.items():
        assert entry.manual or (entry.hub and entry.splits and entry.config), name


def test_trec_rows_have_the_labels_of_older_templates_too(tmp_path):
    """Oracle: the old numbering, in which manner is 0, city 21 and Location the last of six."""
    rows = [
        {"text": "How ?", "coarse_label": 2, "fine_label": 26},
        {"text": "Which city ?", "coarse_label": 4, "fine_label": 32},
        {"text": "old", "label_coarse": 1, "label_fine": 2},
    ]
    write_rows(tmp_path, "trec", "train", rows)
    found = load_rows("trec", None, "train", data_dir=tmp_path)
    labels = [(row["label_coarse"], row["label_fine"]) for row in found]
    assert labels == [(0, 0), (5, 21), (1, 2)] and found[2] == rows[2]
    derive = dataset_table()["trec"].derive
    assert len(derive["label_fine"]["values"]) == 50
    assert set(derive["label_fine"]["values"]) == set(range(47))


def test_an_unreachable_hub_is_asked_once(table, monkeypatch):
    """Then the package looks into its cache alone, as with the user's own HF_HUB_OFFLINE."""
    package = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append(args)
        raise ConnectionError("no route")

    monkeypatch.setattr(package, "load_dataset", load_dataset)
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "is_reachable", lambda address: True)
    table["toy"] = DatasetEntry(hub="a/b", splits=("train",))
    message = "toy is not in the cache, and the hub https://.* cannot be reached: give local rows"
    with pytest.raises(DatasetUnavailable, match=message):
        load_rows("toy", None, "train")
    assert len(asked) == 1 and package.config.HF_HUB_OFFLINE
