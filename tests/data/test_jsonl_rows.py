"""Rows of a jsonl file are found by offsets, and malformed ones are named."""

import json
import pickle

import pytest

from metro.data.jsonl_rows import JsonlRows


def test_jsonl_rows_equal_reading_line_by_line(tmp_path):
    """Oracle: json on each line; blank lines, no final newline, and a BOM-free UTF-8 text."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"n": i, "t": "ü\n" * i}, ensure_ascii=False) for i in range(5)]
    file.write_text("\n" + lines[0] + "\n\n  \n" + "\n".join(lines[1:]), encoding="utf-8")
    rows = JsonlRows(file)
    assert [*rows] == [json.loads(line) for line in lines] and len(rows) == 5
    assert rows[-1] == rows[4] and rows[1:4] == [rows[1], rows[2], rows[3]]
    assert pickle.loads(pickle.dumps(rows))[3] == rows[3]
    assert len(JsonlRows(file, limit=2)) == 2 and len(JsonlRows(file, limit=99)) == 5
    with pytest.raises(IndexError):
        rows[5]
    file.write_text("")
    assert len(JsonlRows(file)) == 0


def test_broken_row_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": \n[1]\n')
    rows = JsonlRows(file)
    with pytest.raises(ValueError, match="rows.jsonl, row 1: unreadable row: not JSON"):
        rows[1]
    with pytest.raises(ValueError, match="row 2: unreadable row: not a JSON object"):
        rows[2]
