"""`metro prepare-prompts` as a user meets it."""

import pytest

from metro.data.prompts.stored import PromptedExamples, read_manifest
from tests.cli.test_main import run_metro
from tests.data.prompts.toys import make_world, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_rows=20)


def prepare(world, *more):
    return run_metro(
        "prepare-prompts", "--templates", str(world / "templates"), "--data-dir",
        str(world / "data"), "--mixture", str(world / "mix.yaml"), *more,
    )  # fmt: skip


def test_prepares_resumes_and_says_what_was_made(world, vocab, tmp_path):
    out = tmp_path / "out"
    done = prepare(world, "--out", str(out), "--vocab", str(vocab), "--limit", "10")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        f"{out}: train 6 tasks, 60 examples; valid 6 tasks, 60 examples; format fairseq"
    )
    again = prepare(world, "--out", str(out), "--vocab", str(vocab), "--limit", "10")
    assert again.returncode == 0 and "already finished" in again.stderr
    assert read_manifest(out)["format"] == "fairseq"


def test_what_is_not_there_is_a_table_and_not_a_failure(world, tmp_path):
    write_rows(tmp_path / "data", "one", "train", [{"text": "t", "label": 4}, {"text": "t"}])
    out = tmp_path / "out"
    done = prepare(world, "--out", str(out), "--data-dir", str(tmp_path / "data"), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "not available" in done.stderr and "two/sub" in done.stderr
    assert "Traceback" not in done.stderr
    why = "label out of range of the answer choices (first: one, 'ask', row 0"
    assert f"dropped 2 of 6 prompts (33.3%): {why}" in done.stderr
    assert len(PromptedExamples(out / "train/one_copy")) == 2
    nothing = prepare(world, "--out", str(tmp_path / "no"), "--data-dir", str(tmp_path))
    assert nothing.returncode == 2 and "not a single example could be made" in nothing.stderr
    assert not (tmp_path / "no").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path):
    out = tmp_path / "out"
    done = prepare(world, "--out", str(out), "--dry-run", "--dataset", "two/sub")
    assert done.returncode == 0, done.stderr
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in done.stdout.splitlines()
        if "two/sub" in line
    ]
    assert [row[:7] for row in cells] == [
        ["train", "two/sub", "3", "20", "60", "33", "60"],
        ["valid", "two/sub", "3", "40", "120", "33", "120"],
    ]
    assert not out.exists() and "one" not in done.stdout.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "out is missing"),
        (["--out", "OUT", "--dataset", "three"], "has no dataset 'three'"),
        (["--out", "OUT", "--format", "fairseq"], "--vocab DIR"),
    ],
)
def test_wrong_options_are_one_line(world, tmp_path, options, message):
    done = prepare(world, *(option.replace("OUT", str(tmp_path / "x")) for option in options))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "x").exists()
