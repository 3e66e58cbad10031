"""Rows and prompts left out, and values cut: each is counted and said."""

import json

import pytest

from metro.evaluation.runs.run_folder import read_run
from tests.data.prepared import Said
from tests.evaluation.toy import run, without_times, write_suite


def test_rows_that_cannot_be_asked_are_left_out_and_counted(tmp_path, loaded):
    """Oracle: by hand: one row without answer, one with an empty option, one whose options are all
    alike; of three good ones one has two options alike."""
    suite_file = write_suite(tmp_path)
    rows = [
        {"thing": "a", "colours": ["red", "blue"], "answer": 0},
        {"thing": "b", "colours": ["red", ""], "answer": 0},
        {"thing": "c", "colours": ["red", "red", "blue"], "answer": 1},
        {"thing": "d", "colours": ["red", "blue"], "answer": 7},
        {"thing": "e", "colours": ["red", "blue"], "answer": 1},
        {"thing": "f", "colours": ["red", "red"], "answer": 1},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "colour.jsonl").write_text(text)
    said = Said()
    run(tmp_path / "run", suite_file, *loaded, progress=said)
    result = read_run(tmp_path / "run").results[0]
    assert result.num_examples == 3
    assert without_times(tmp_path / "run")[0]["skipped"] == 3
    why = "empty answer choice (first: row 1: ['red', ''])"
    assert f"colour / plain: 1 of 6 rows left out: {why}" in said.lines
    note = "1 row with duplicate answer choices; duplicates count as one choice"
    assert f"colour / plain: {note}" in said.lines
    scores = [json.loads(line) for line in (tmp_path / "run" / result.scores_file).open()]
    assert [score["index"] for score in scores] == [0, 2, 4]
    assert scores[1]["prediction"] != 1 and scores[1]["label"] == 0


def test_a_prompt_that_cannot_be_evaluated_is_left_out_and_named(tmp_path, loaded):
    """Oracle: the other three prompts, one before and two after it; the reason."""
    suite_file = write_suite(tmp_path)
    text = suite_file.read_text()
    suite_file.write_text(text.replace("answer_choices[answer]}}", "answer_choices[9]}}", 1))
    said = Said()
    assert run(tmp_path / "run", suite_file, *loaded, progress=said) == 2
    for prompt in ("plain", "again"):
        reason = f"colour / {prompt}: left out: no row can be evaluated: label out of range"
        assert any(line.startswith(reason) for line in said.lines)
    found = [(result.task, result.prompt) for result in read_run(tmp_path / "run").results]
    assert found == [("colour", "listed"), ("truth", "ask")]


def test_flipped_does_not_score_an_instruction_without_words(tmp_path, loaded):
    suite_file = write_suite(tmp_path)
    suite_file.write_text(suite_file.read_text().replace("What colour is {{thing}}?", "{{thing}}"))
    said = Said()
    assert run(tmp_path / "run", suite_file, *loaded, method="flipped", progress=said) == 2
    reason = "colour / plain: left out: no row can be evaluated: no instruction to guess"
    assert any(line.startswith(reason) for line in said.lines)


def test_long_options_are_cut_with_a_note(tmp_path, loaded):
    """Oracle: an option of 300 words against a limit of 256 tokens."""
    suite_file = write_suite(tmp_path)
    row = {"thing": "a", "colours": ["red " * 300, "blue"], "answer": 1}
    (tmp_path / "colour.jsonl").write_text(json.dumps(row) + "\n")
    said = Said()
    run(tmp_path / "run", suite_file, *loaded, progress=said)
    assert any("1 answer choice cut at 256 tokens" in note for note in said.lines)


@pytest.mark.parametrize("method", ["direct", "flipped"])
def test_long_prompts_are_cut_with_a_note(tmp_path, loaded, method):
    """Oracle: three rows are longer than 512 tokens; what stands at their end is lost. One of them
    is cut by the template, too."""
    suite_file = write_suite(tmp_path)
    things = ["so " * 600 + "red", "so " * 600 + "blue", "so " * 900, "grass"]
    rows = [{"thing": thing, "colours": ["red", "blue"], "answer": 0} for thing in things]
    (tmp_path / "colour.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for side, lost in (("right", "end"), ("left", "beginning")):
        said, folder = Said(), tmp_path / side
        run(folder, suite_file, *loaded, method=method, progress=said, truncation_side=side)
        number = 3 if method == "direct" else 6  # with each answer choice
        note = f"colour / plain: {number} sources cut at 512 tokens, losing the {lost}"
        assert any(line.startswith(note) for line in said.lines)
        note = "colour / plain: 1 row with a value cut at 2048 characters, as published"
        assert note in said.lines
        result = without_times(folder)[0]
        assert (result["cut_sources"], result["cut_targets"]) == (number, 0)
        scores = (folder / result["scores_file"]).read_text().splitlines()
        found[side] = [json.loads(line)["scores"] for line in scores]
    assert (found["right"][0] == found["right"][1]) and (found["left"][0] != found["left"][1])
    with pytest.raises(ValueError, match="truncation_side 'left', this one has 'right'"):
        run(tmp_path / "left", suite_file, *loaded, method=method)


def test_options_of_equal_tokens_are_noted(tmp_path, loaded):
    """Oracle: an uncased vocabulary cannot tell "Red" from "red"."""
    suite_file = write_suite(tmp_path)
    row = {"thing": "a", "colours": ["Red", "red"], "answer": 1}
    (tmp_path / "colour.jsonl").write_text(json.dumps(row) + "\n")
    said = Said()
    run(tmp_path / "run", suite_file, *loaded, progress=said)
    note = "1 row with different answer choices of equal tokens;"
    assert any(note in text for text in said.lines)
    assert read_run(tmp_path / "run").results[0].accuracy == 0.0
