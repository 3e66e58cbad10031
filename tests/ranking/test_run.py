"""`metro.rank` writes what `metro.Ranker` says, in order, and resumes where it was stopped.

Oracle, unless a test says otherwise: `Ranker` on the same rows.
"""

import csv
import json

import pytest

import metro
from metro.data.local_files import open_rows
from metro.ranking.output import RankedFile
from metro.ranking.ranker import Ranker
from metro.ranking.run import RankRun
from metro.ranking.settings import RankSettings
from metro.utils.locks import locked
from metro.utils.messages import UserError
from tests.data.prepared import Said
from tests.ranking.conftest import MAILS, OPTIONS, TEMPLATE


@pytest.fixture
def rank(model, mails):
    def run(out=None, **more):
        options = dict(input=mails, options=OPTIONS, template=[TEMPLATE], out=out, progress=False)
        return metro.rank(model=model, **{**options, **more})

    return run


@pytest.fixture
def expected(model):
    return Ranker(model, OPTIONS, template=[TEMPLATE])(MAILS)


def read(path):
    if path.suffix != ".csv":
        return list(open_rows(path))
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_files_of_every_kind_have_all_rows_in_order(rank, expected, tmp_path, ending):
    done = rank(tmp_path / f"out{ending}")
    assert done == ([], tmp_path / f"out{ending}", len(MAILS), 0)
    rows = read(done.out)
    assert [int(row["row"]) for row in rows] == list(range(len(MAILS)))
    assert [row["label"] for row in rows] == [each.label for each in expected]
    for row, each in zip(rows, expected, strict=True):
        assert float(row["probability"]) == pytest.approx(each.probability)
        for option in OPTIONS:
            is_table = ending != ".jsonl"
            found = row[f"probability: {option}"] if is_table else row["probabilities"][option]
            assert float(found) == pytest.approx(each.probabilities[option])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mails.jsonl", f"out{ending}"]
    with pytest.raises(UserError, match="exists: choose another name, or replace it"):
        rank(done.out)


def test_texts_that_are_cut_are_counted(rank):
    """Oracle: by hand, two texts of more than 512 tokens, one of them cut by the template, too."""
    said = Said()
    rank(input=None, texts=["short", "so " * 600, "so " * 900], progress=said)
    assert "1 row with a value cut at 2048 characters, as published" in said.lines
    assert any(line.startswith("2 sources cut at 512 tokens, losing") for line in said.lines)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".json", ".txt"])
def test_input_of_every_kind_is_ranked(rank, expected, tmp_path, ending):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(MAILS), path)
    elif ending == ".json":
        path.write_text(json.dumps(MAILS))
    elif ending == ".txt":
        path.write_text("".join(row["body"] + "\r\n" for row in MAILS))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, MAILS[0], delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(MAILS)
    text = {} if ending == ".txt" else {"text": "body"}
    found = rank(input=path, **text).ranked
    assert [each.log_probabilities for each in found] == [
        each.log_probabilities for each in expected
    ]
    assert [each.text for each in found] == [row["body"] for row in MAILS]


def test_options_of_each_row_are_written_as_json(rank, tmp_path):
    rows = [{"body": "a", "o": ["x", "y"]}, {"body": "b", "o": ["z", "x", "ü"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rank(tmp_path / "out.csv", input=tmp_path / "rows.jsonl", options=None, options_field="o")
    found = [list(json.loads(row["probabilities"])) for row in read(tmp_path / "out.csv")]
    assert found == [["x", "y"], ["z", "x", "ü"]]


def test_two_do_not_rank_into_one_file(rank, tmp_path):
    partial = tmp_path / ".out.csv.partial"
    with locked(partial), pytest.raises(UserError, match="is being written by"):
        rank(tmp_path / "out.csv")


class Killed(Exception):
    pass


@pytest.fixture
def stopped(rank, tmp_path, monkeypatch):
    """An output that was stopped while it wrote its third window of three rows."""
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(Ranker, "window", property(lambda self: 3, lambda self, value: None), False)
    write = RankedFile.write

    def die(self, rows, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            self.file.write(b'{"digest": "half a li')
            self.file.flush()
            raise Killed
        write(self, rows)

    monkeypatch.setattr(RankedFile, "write", die)
    with pytest.raises(Killed):
        rank(out)
    monkeypatch.setattr(RankedFile, "write", write)
    return out


def test_a_stopped_run_is_resumed_behind_its_last_row(rank, expected, stopped, monkeypatch):
    asked = []
    ask = Ranker.rank

    def noting(self, rows, **more):
        rows = list(rows)
        asked.extend(row["id"] for row in rows)
        return ask(self, rows, **more)

    monkeypatch.setattr(Ranker, "rank", noting)
    done = rank(stopped)
    assert asked == [row["id"] for row in MAILS[6:]] and done.num_rows == len(MAILS)
    rows = read(done.out)
    assert [row["row"] for row in rows] == list(range(len(MAILS)))
    for row, each in zip(rows, expected, strict=True):
        assert row["log_probabilities"] == pytest.approx(each.log_probabilities, abs=1e-5)


def test_a_damaged_row_of_a_stopped_run_and_those_behind_it_are_ranked_again(
    rank, expected, stopped
):
    """Oracle: the ranker; a digit of the second row's probability was changed."""
    partial = stopped.with_name(f".{stopped.name}.partial")
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 8 and '"probability": 0.' in lines[2]
    before, name, after = lines[2].rpartition('"probability": 0.')
    lines[2] = f"{before}{name}{int(after[0]) ^ 1}{after[1:]}"
    partial.write_text("".join(lines))
    for row, each in zip(read(rank(stopped).out), expected, strict=True):
        assert row["probability"] == pytest.approx(each.probability, abs=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"template": ["Which? {{body}}"]}, "holds a run with templates"),
        ({"method": "channel"}, "holds a run with method 'direct', this one has 'channel'"),
        ({"options": ["a", "b"]}, "holds a run with options"),
    ],
)
def test_a_stopped_run_is_not_mixed_with_another(rank, stopped, more, message):
    with pytest.raises(UserError, match=message):
        rank(stopped, **more)
    done = rank(stopped, **more, overwrite=True)
    assert done.num_rows == len(MAILS)


def test_a_stopped_run_is_not_resumed_on_other_rows(rank, mails, stopped):
    lines = mails.read_text().splitlines(keepends=True)
    mails.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="row 0 of the input has changed since"):
        rank(stopped)
    mails.write_text("".join(lines[:4]))
    with pytest.raises(UserError, match="row 4 of the input has changed since"):
        rank(stopped)
    mails.write_text("".join(lines) + lines[0])  # rows that came later
    assert rank(stopped).num_rows == len(MAILS) + 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input": None}, "no texts to rank"),
        ({"input": "none.csv"}, "there is no file none.csv"),
        ({"text": "subject"}, "has no field 'subject': it has body, id, label"),
        ({"options": None, "options_field": "x"}, "has no field 'x'"),
        ({"template": None}, "which field of .* is the text\\? --text one of body, id, label"),
        (
            {"input": None, "texts": ["a", "b"], "template": ["{{subject}} {{body}}"]},
            "none of the first 2 rows can be ranked: missing",
        ),
    ],
)
def test_wrong_input_is_refused(rank, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        rank(tmp_path / "out.csv", **more)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("ending", "more", "message"),
    [
        (".jsonl", {"template": ["Is it? {{boddy}}"]}, "has no field 'boddy': it has body, id"),
        (".jsonl", {"template": ["{{id}} {{boddy}}"], "text": "body"}, "has no field 'boddy'"),
        (".jsonl", {"text": "bodi"}, "has no field 'bodi'"),
        (".txt", {"template": ["{{subject}} {{text}}"]}, "to read subject: a csv"),
    ],
)
def test_fields_that_no_row_has_are_refused_before_the_model_is_loaded(
    mails, tmp_path, ending, more, message
):
    path = mails.rename(tmp_path / f"rows{ending}")
    with pytest.raises(UserError, match=message):
        metro.rank(model="no/such-model", input=path, options=OPTIONS, progress=False, **more)


def test_a_blank_line_keeps_its_place(rank, tmp_path):
    """By hand: the third of four lines is blank."""
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\nfour \xc3\xbc")
    ranked = rank(input=path).ranked
    assert [each.text for each in ranked] == ["one", "two", "", "four ü"]
    assert [each.problem for each in ranked] == [None, None, "empty text", None]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        rank(input=path)


def test_the_number_of_rows_is_known_for_every_kind_of_file(model, mails, tmp_path):
    """By hand; without it there is no ETA, and several processes cannot share the rows."""
    lines = tmp_path / "rows.txt"
    lines.write_text("a\nb\n\nc")
    for path, text, count in ((lines, None, 4), (mails, "body", len(MAILS))):
        settings = RankSettings.of(model=model, input=str(path), text=text, options=OPTIONS)
        assert RankRun(settings, None, Said()).total == count
