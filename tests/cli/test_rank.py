"""`metro rank`, as it is typed.

Oracle: `metro.Ranker`.
"""

import io
import json
import sys

import pytest

from metro.cli.main import load_command
from metro.ranking.ranker import Ranker
from metro.utils.messages import UserError

OPTIONS = ["complaint", "question", "a praise"]
TEXTS = ["My parcel never came.", "the  sea"]


@pytest.fixture(scope="module")
def model(golden):
    return str(golden / "hf_export/metro_tiny_a")


@pytest.fixture
def call(capsys, monkeypatch):
    def run(*arguments, stdin: str | None = None) -> list[str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        load_command("rank")([str(each) for each in arguments], standalone_mode=False)
        captured = capsys.readouterr()
        run.said = captured.err
        return captured.out.splitlines()

    return run


def test_texts_of_the_command_line_and_of_stdin_are_ranked(call, model):
    expected = Ranker(model, OPTIONS)(TEXTS)
    printed = [f"{e.label}\t{e.probability:.4f}\t{' '.join(e.text.split())}" for e in expected]
    assert call(model, *TEXTS, "--options", *OPTIONS) == printed
    assert "asked with (--template changes it)" in call.said
    assert call(model, "--options", *OPTIONS, stdin="\n".join(TEXTS)) == printed
    assert call(model, TEXTS[0], "-", "--options", *OPTIONS, stdin=TEXTS[1]) == printed
    lines = [json.loads(line) for line in call(model, *TEXTS, "--options", *OPTIONS, "--json")]
    assert lines == [each._asdict() for each in expected]


def test_rows_none_of_which_can_be_ranked_are_an_error(call, model, tmp_path, capsys):
    """Also where the labels are printed, of which there are none then; else one has its problem."""
    (tmp_path / "empty.txt").touch()
    arguments = (*TEXTS, "--template", "{{subject}} {{body}}")
    with pytest.raises(
        UserError, match="none of the first 2 rows .*the row has no 'subject', 'body'"
    ):
        call(model, *arguments, "--options", *OPTIONS)
    assert capsys.readouterr().out == ""
    printed = call(model, "--options", *OPTIONS, stdin="\nMy parcel never came.\n")
    assert printed[0] == "\t\t\tempty text" and printed[1].endswith("\tMy parcel never came.")
    with pytest.raises(UserError, match="empty.txt has no rows"):
        call(model, "--input", tmp_path / "empty.txt", "--options", *OPTIONS)


def test_a_file_is_ranked_into_a_file(call, model, tmp_path):
    """The command of README, and a row that has no text."""
    (tmp_path / "mails.csv").write_text("id,body\n1,My parcel never came.\n2,\n")
    arguments = ("--input", tmp_path / "mails.csv", "--text", "body", "--options", *OPTIONS)
    out = tmp_path / "ranked.jsonl"
    assert call(model, *arguments, "--out", out) == []
    assert "1 row without a label: empty text (first: row 1)" in call.said
    first, second = map(json.loads, out.read_text().splitlines())
    [expected] = Ranker(model, OPTIONS)(TEXTS[:1])
    assert first["label"] == expected.label
    assert first["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert second["label"] is None and second["problem"] == "empty text"
    with pytest.raises(UserError, match="give texts or --input"):
        call(model, "a text", *arguments)
