"""Own rows are the same whatever holds them, and are divided into splits as asked.

Oracle: the rows that were written.
"""

import csv
import gzip
import json

import pytest

from metro.data.own_rows import OwnData, drawn_apart
from metro.utils.messages import UserError

ROWS = [
    {"body": f"mail {n}", "label": "ab"[n % 2], "part": "train dev test".split()[n % 3]}
    for n in range(9)
]


def write(folder, kind):
    import datasets

    path = folder / f"mails{kind}"
    table = datasets.Dataset.from_list(ROWS)
    if kind in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == ".parquet":
        table.to_parquet(path)
    elif kind == "":
        table.save_to_disk(path)
    else:
        content = json.dumps(ROWS)
        if "jsonl" in kind:
            content = "".join(json.dumps(row) + "\n" for row in ROWS)
        (gzip.open if kind.endswith(".gz") else open)(path, "wb").write(content.encode())
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".jsonl.gz", ".parquet", ""])
def test_every_kind_of_file_has_the_same_rows(tmp_path, kind):
    path = write(tmp_path, kind)
    data = OwnData(path)
    assert (data.name, data.splits) == ("mails", [""])
    assert list(data.rows(data.choose(None))) == ROWS
    with pytest.raises(UserError, match="is a single file and has no split 'test'"):
        data.choose("test")
    by_field = OwnData(path, split_field="part")
    assert by_field.choose(None, "train") == "train" and by_field.find("validation") == "dev"
    assert list(by_field.rows("dev")) == ROWS[1::3]


def test_files_of_a_folder_are_splits_and_nothing_is_guessed(tmp_path):
    write(tmp_path, ".csv").rename(tmp_path / "train.csv")
    write(tmp_path, ".jsonl").rename(tmp_path / "val.jsonl")
    data = OwnData(tmp_path)
    assert sorted(data.splits) == ["train", "val"]
    (tmp_path / "prepare_text.json").write_text("{}")
    assert sorted(OwnData(tmp_path).splits) == ["train", "val"]
    assert data.choose("validation") == "val" == data.choose(None, "test", "validation")
    with pytest.raises(UserError, match="has no split 'test', but train, val"):
        data.choose("test")
    with pytest.raises(UserError, match="has no subset 'de'"):
        OwnData(tmp_path, "de")
    with pytest.raises(UserError, match="has the splits train, val: choose one with --split"):
        data.choose(None)
    with pytest.raises(UserError, match="has no field 'parts': it has body, label, part"):
        OwnData(tmp_path / "train.csv", split_field="parts")
    with pytest.raises(UserError, match=r"there is no file .*\.csv"):
        OwnData(tmp_path / "test.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no rows .it is empty"):
        OwnData(tmp_path / "empty")


def test_rows_drawn_apart_are_the_same_for_a_seed_and_lose_none():
    rest, drawn = drawn_apart(ROWS, 0.3, seed=4)
    assert (len(rest), len(drawn)) == (6, 3)
    assert sorted([*rest, *drawn], key=str) == sorted(ROWS, key=str)
    assert [list(part) for part in drawn_apart(ROWS, 0.3, seed=4)] == [list(rest), list(drawn)]
    assert list(drawn_apart(ROWS, 0.3, seed=5)[1]) != list(drawn)
