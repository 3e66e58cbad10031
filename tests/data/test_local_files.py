"""Rows of files of every kind, and the splits of a folder."""

import csv
import gzip
import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest

from metro.data.datasets import DatasetUnavailable, load_rows, stray_files
from metro.data.local_files import open_rows
from metro.evaluation.tasks.loading import Sources, load_task
from metro.evaluation.tasks.suites import read_suite
from metro.utils.messages import UserError
from tests.data.prompts.toys import YES_NO, prepare, write_rows, write_templates
from tests.processes import run_python

ROWS = [
    {"text": 'Größe, "so"\nit is', "label": 0, "score": 0.5, "date": "2020-01-01", "code": "007"},
    {"text": "NA", "label": -1, "score": 2.0, "date": "2021-05-05", "code": "1e5"},
    {"text": " \u2028 blank", "label": 1, "score": -1.25, "date": "2022-01-01", "code": "1.50"},
]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setenv("METRO_CACHE", str(tmp_path / "cache"))
    return datasets


def write_every_kind(folder: Path, datasets, rows: list[dict]) -> list[Path]:
    """The same rows in every kind of file, with ``json``, ``csv`` or ``datasets`` themselves."""
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "lines.jsonl").write_text("".join(lines))
    (folder / "mark.jsonl").write_text("".join(lines), encoding="utf-8-sig")
    (folder / "lines.json").write_text("".join(lines))
    (folder / "list.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    (folder / "object.json").write_text(json.dumps({"version": "1", "data": rows}))
    for kind, mark, encoding in (("csv", ",", "utf-8"), ("tsv", "\t", "utf-8-sig")):
        with (folder / f"rows.{kind}").open("w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, rows[0], delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "rows.parquet")
    table.save_to_disk(folder / "saved")
    shutil.copy(next((folder / "saved").glob("*.arrow")), folder / "rows.arrow")
    for path in [path for path in folder.iterdir() if path.is_file()]:
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return sorted(folder.iterdir())


def test_every_kind_gives_the_same_rows(tmp_path, caches):
    """Oracle: the rows themselves. Dates, leading zeros and ``NA`` stay text, as written."""
    paths = write_every_kind(tmp_path / "files", caches, ROWS)
    assert len(paths) == 19
    for path in paths:
        rows = open_rows(path)
        assert [*rows] == ROWS and rows[1:] == ROWS[1:], path.name
        assert [*open_rows(path, limit=2)] == ROWS[:2], path.name
    changed = [{**row, "text": "other"} for row in ROWS]
    path = tmp_path / "files" / "rows.parquet"
    stat = path.stat()
    caches.Dataset.from_list(changed).to_parquet(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [*open_rows(path)] == changed  # known by its content, not by its time


def test_columns_of_csv_are_numbers_or_lists_where_all_cells_are(tmp_path):
    """Oracle: by hand. Truth values, empty cells, a label that looks like a number, an index."""
    path = tmp_path / "rows.csv"
    path.write_text(
        ",label,flag,options,empty,mixed,answer,big\n"
        '0,1,True,"[""a"", ""b""]",,1,1,12345678901234567890\n'
        "1,,False,[],,x,2,1\n"
    )
    rows = open_rows(path, texts=("answer",))
    assert [*rows] == [
        {"column 1": 0, "label": 1, "flag": True, "options": ["a", "b"], "empty": "", "mixed": "1",
         "answer": "1", "big": "12345678901234567890"},
        {"column 1": 1, "label": None, "flag": False, "options": [], "empty": "", "mixed": "x",
         "answer": "2", "big": "1"},
    ]  # fmt: skip
    path.write_text("options\n\"['a' 'b']\"\n")
    with pytest.raises(UserError, match="'options' has lists that are not JSON"):
        open_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"a,a\n1,2\n", "one twice"),
        ("rows.csv", b"a,b\n\n", "rows.csv has no rows"),
        ("rows.csv", b"", "no names of columns"),
        ("rows.csv", b"a,b\n1,2,3\n1,2\n", "line 2 has 3 cells and not 2"),
        ("rows.csv", b'a,b\n1,"x"y"\n', "line 2 is not csv"),
        ("rows.tsv", b'a\tb\n1\t"x\n2\ty\n', "line 3 is not csv"),
        ("rows.csv", "a\nGröße\n".encode("latin-1"), "rows.csv is not UTF-8"),
        ("rows.csv", "a\n1\n".encode("utf-16"), "rows.csv is UTF-16"),
        ("rows.json", b'[{"a": 1}, {"a"', "not complete JSON"),
        ("rows.json", b'{"data": [{"a": 1}]', "not complete JSON"),
        ("rows.json", b"[1, 2]", "has no rows"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-6], "not a complete gzip file"),
        ("rows.parquet", b"PAR1", "cannot be read as .parquet"),
        ("rows.arrow", b"ARROW1", "cannot be read as .arrow"),
        ("rows.xlsx", b"PK", "rows come from .jsonl, .json, .csv"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        open_rows(tmp_path / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_splits_are_found_under_their_usual_names_and_layouts(tmp_path, caches):
    """The layouts of the hub, of save_to_disk, of MMLU's archive; the validation split's names."""
    table = caches.Dataset.from_list(ROWS)
    (tmp_path / "hub/data").mkdir(parents=True)
    for number in range(2):
        table.to_parquet(tmp_path / f"hub/data/train-0000{number}-of-00002.parquet")
    caches.DatasetDict({"validation": table}).save_to_disk(tmp_path / "saved")
    for name in ("valid", "val", "dev"):
        write_rows(tmp_path, name, name, [{"split": name}])
    write_rows(tmp_path, "both", "dev", [{"split": "dev"}])
    write_rows(tmp_path, "both", "val", [{"split": "val"}])
    assert [*load_rows("hub", None, "train", data_dir=tmp_path)] == ROWS * 2
    assert [*load_rows("saved", None, "validation", data_dir=tmp_path)] == ROWS
    for name in ("valid", "val", "dev"):
        assert load_rows(name, None, "validation", data_dir=tmp_path)[0] == {"split": name}
    assert load_rows("both", None, "validation", data_dir=tmp_path)[0] == {"split": "val"}
    (tmp_path / "test").mkdir()
    (tmp_path / "test/anatomy_test.csv").write_text('"Is 1, 2?",NA,1,2,"a, b",D\nYes?,1,2,3,4,A\n')
    row = load_rows("mmlu", "anatomy", "test", data_dir=tmp_path)[0]
    assert row == {"question": "Is 1, 2?", "A": "NA", "B": 1, "C": 2, "D": "a, b", "answer": "D"}


def test_local_rows_may_have_the_names_of_the_hub_or_of_the_templates(tmp_path):
    for subset in ("original", "hub"):
        row = {"query" if subset == "hub" else "question": "q"}
        write_rows(tmp_path / subset, "wiki_hop", "train", [row], "original")
        rows = load_rows("wiki_hop", "original", "train", data_dir=tmp_path / subset)
        assert rows[0] == {"question": "q"}


def test_what_lies_there_unread_is_said(tmp_path):
    write_templates(tmp_path / "templates", "own", YES_NO)
    rows = [{"text": "a", "label": 1}]
    write_rows(tmp_path / "data", "own", "train", rows)
    write_rows(tmp_path / "data", "own", "colours", rows)
    (tmp_path / "data/own/default/old.xlsx").touch()
    (tmp_path / "data/own/default/README.md").touch()
    (tmp_path / "mix.yaml").write_text("datasets: [own]\n")
    result, said = prepare(tmp_path, tmp_path / "out")
    strays = "not read, as no split is called so: own/default/colours.jsonl, own/default/old.xlsx"
    assert strays in said[0] and not result.manifest["splits"]["valid"]
    script = tmp_path / "data/script"
    script.mkdir()
    (script / "script.py").touch()
    with pytest.raises(DatasetUnavailable, match=r"script.py \(a loading script, which is never"):
        load_rows("script", None, "train", data_dir=tmp_path / "data")
    write_rows(tmp_path / "data", "two", "train", rows)
    (tmp_path / "data/two/default/train.csv").write_text("text,label\na,1\n")
    with pytest.raises(UserError, match="several files for one split"):
        load_rows("two", None, "train", data_dir=tmp_path / "data")
    with pytest.raises(UserError, match="leads out"):
        load_rows("../own", None, "train", data_dir=tmp_path / "data/two")
    assert stray_files(tmp_path / "data", "two", None) == []


def test_a_suites_own_data_may_be_any_kind(tmp_path, caches):
    """Oracle: the rows, for a csv, a saved table, and a saved pair of splits by its name."""
    table = caches.Dataset.from_list(ROWS)
    (tmp_path / "rows.csv").write_text("text,label\na,1\n")
    table.save_to_disk(tmp_path / "one")
    caches.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    prompts = '{p: {jinja: "{{text}} ||| {{answer_choices[label]}}", answer_choices: "x ||| y"}}'
    places = {"a": "rows.csv", "b": "one", "c": "two, split: test", "d": "two"}
    tasks = [f"  {name}: {{data: {data}, prompts: {prompts}}}" for name, data in places.items()]
    (tmp_path / "s.yaml").write_text("tasks:\n" + "\n".join(tasks))
    suite = read_suite(tmp_path / "s.yaml")
    sizes = [len(load_task(suite.tasks[name], Sources()).data) for name in "abc"]
    assert sizes == [1, 3, 1]
    with pytest.raises(DatasetUnavailable, match="two has the splits test, train: name it"):
        load_task(suite.tasks["d"], Sources())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_memory_stays_flat_as_rows_grow(tmp_path, caches, kind):
    """Oracle: the peak, without mapped files, of reading 300,000 rows beside that of 20,000."""
    peaks = []
    for count in (20_000, 300_000):
        path = tmp_path / f"rows{count}.{kind}"
        rows = [{"text": f"{i} " + "x" * 400, "label": i % 2} for i in range(count)]
        if kind == "json":
            path.write_text(json.dumps(rows))
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            getattr(caches.Dataset.from_list(rows), f"to_{kind}")(path)
        del rows
        code = f"""
            import threading, time
            from pathlib import Path
            from metro.data.local_files import open_rows
            sizes = []
            def watch():
                while True:
                    lines = Path("/proc/self/status").read_text().splitlines()
                    sizes.append(next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")))
                    time.sleep(0.01)
            threading.Thread(target=watch, daemon=True).start()
            rows = open_rows(Path({str(path)!r}))
            assert len(rows) == {count} and sum(rows[i]["label"] for i in range(0, {count}, 97))
            print(max(sizes))
        """
        peaks.append(int(run_python("-c", textwrap.dedent(code)).stdout))
    assert peaks[1] < peaks[0] + 60_000  # kilobytes; the rows are 120 MB
