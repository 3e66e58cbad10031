"""`metro report` writes every format and refuses in one line.

Oracle: the run written here, whose numbers are known, and the files and exit status that follow.
"""

import pytest
from click.testing import CliRunner

from metro.cli.main import load_command
from tests.evaluation.run_folders import write_run
from tests.processes import METRO, run_python


@pytest.fixture
def run(tmp_path):
    prompts = {"rte": {"a": 0.61, "b": 0.65}, "cb": {"a": 0.5}}
    return write_run(tmp_path / "run", prompts, registered="metro_t0_base")


def call(*arguments):
    return CliRunner().invoke(load_command("report"), [str(item) for item in arguments])


def test_report_writes_all_files_and_prints_averages(run, tmp_path):
    """Oracle: by hand, rte 63, cb 50, so the average is 56.5; the card says 61.62 and 52.74."""
    done = call(run, "--out", tmp_path / "report", "--title", "My <title>")
    assert done.exit_code == 0, done.output
    assert "T0 Eval: METRO-T0-Base (direct) 56.50, over 2 tasks" in done.output
    names = {"report.html", "report.md", "report.tex", "tasks.csv", "prompts.csv", "t0.svg"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h1>My &lt;title&gt;</h1>" in page
    assert "+1.38" in page and "−2.74" in page and "METRO-T0-Large++" in page


def test_a_method_is_said_once(run, tmp_path):
    """Oracle: by hand: two methods of one model, whose labels have them already."""
    other = write_run(tmp_path / "other", {"rte": {"a": 0.5}}, method="channel",
                      registered="metro_t0_base")  # fmt: skip
    done = call(run, other, "--out", tmp_path / "report")
    lines = [line for line in done.output.splitlines() if line.startswith("T0 Eval")]
    assert lines == ["T0 Eval: METRO-T0-Base, direct 56.50, over 2 tasks",
                     "T0 Eval: METRO-T0-Base, channel 50.00, over 1 of 2 tasks"]  # fmt: skip


def test_published_rows_are_chosen_by_option(run, tmp_path):
    """Oracle: the models named; none leaves only the run."""
    for options, has, has_not in [
        (["--published", "none"], [], ["METRO-T0-Large++", "to published", "T0-3B"]),
        (["--published", "t0_3b"], ["T0-3B"], ["METRO-T0-Large++", "to published"]),
        (["--published", "t0_3b", "--published", "metro_t0_base"], ["T0-3B", "to published"], []),
    ]:
        assert call(run, "--out", tmp_path / "report", *options).exit_code == 0
        text = (tmp_path / "report" / "report.md").read_text()
        assert all(word in text for word in has) and not any(word in text for word in has_not)


def test_partial_runs_are_named_on_the_terminal(tmp_path):
    """Oracle: one of two prompts is there, so no task is complete."""
    run = write_run(tmp_path / "run", {"rte": {"a": 0.5}}, listed={"rte": ["a", "b"]})
    done = call(run, "--out", tmp_path / "report")
    assert "(direct) no task is complete" in done.output
    assert "note: partial, not in the average: rte (1 of 2 prompts)" in done.output


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    """Oracle: exit status 2, no traceback, nothing written."""
    (tmp_path / "empty").mkdir()
    done = run_python(*METRO, "report", "empty", "--out", "out", code=2, cwd=tmp_path)
    assert done.stderr.count("\n") == 1 and "is not a run folder" in done.stderr
    assert not (tmp_path / "out").exists()
