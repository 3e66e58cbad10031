"""Progress on a terminal, elsewhere, and not at all."""

import re
import sys

import pytest
from rich.console import Console

from metro.utils import progress as module
from metro.utils.progress import SILENT, Progress
from tests.processes import run_python


@pytest.fixture
def terminal(monkeypatch):
    """Stderr is a terminal, whatever the environment says of it (``TTY_COMPATIBLE=0`` in a CI)."""
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def test_a_terminal_has_a_bar_per_step_that_ends_where_the_work_ended(capsys, terminal):
    """Claim: the last state is shown however fast the work was; text is not read as markup."""
    with Progress() as progress:
        for done in range(3):
            progress.show("reading", done, 2, "[a]")
        progress.show("[b]", 1, 4)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    reading, b = [line for line in plain.splitlines() if line.strip()][-2:]
    assert reading.startswith("reading") and "100%" in reading and reading.rstrip().endswith("[a]")
    assert b.startswith("[b]") and "25%" in b


def test_elsewhere_a_line_follows_after_some_silence(capsys, monkeypatch):
    """Oracle: the clock by hand: half of the work in 30 s leaves 30 s."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress() as progress:
        progress.show("all", 2, 6)
        now[0] = 5.0
        progress.show("all", 3, 6)
        now[0] = 30.0
        progress.show("all", 4, 6, "rte")
        progress.say("a [line]")
    assert capsys.readouterr().err == "all 67%  0:00:30 left  rte\na [line]\n"


def test_a_notebook_has_lines_although_its_stderr_says_that_it_is_a_terminal(capsys, monkeypatch):
    """Oracle: no codes that move a cursor, which it prints as text."""
    monkeypatch.setitem(sys.modules, "ipykernel", module)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    with Progress() as progress:
        progress.show("all", 1, 2)
        progress.say("done")
    shown = capsys.readouterr().err
    assert shown.endswith("done\n") and "\x1b" not in shown


def test_a_step_begins_again_where_its_work_goes_back(capsys, monkeypatch, terminal):
    """Oracle: the clock by hand: the second pass does half of its work in 2 s, after 100 s."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress() as progress:
        progress.show("all", 0, 4)
        now[0] = 100.0
        progress.show("all", 4, 4)
        progress.show("all", 1, 5)
        assert progress.time_left("all", 1, 5) == ""
        now[0] = 102.0
        progress.show("all", 3, 5)
        assert progress.time_left("all", 3, 5) == "0:00:02"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    bars = [line.rstrip() for line in plain.splitlines() if line.startswith("all")]
    assert " 60% " in bars[-1] and bars[-1].endswith("0:00:02 left")


def test_nothing_is_shown_where_nobody_wants_it(capsys, terminal):
    for progress in (SILENT, Progress.of(False)):
        with progress:
            progress.say("hello")
            progress.show("all", 1, 2)
    assert capsys.readouterr() == ("", "")
    assert Progress.of(progress) is progress and Progress.of(True).enabled


LONG_WORK = """
import os, time
from metro.utils import progress as module
os.dup2(1, 2)
module.SECONDS_TO_FIRST_SIGN, module.LIFE.silence = 0.3, 1.0
with module.Progress() as progress:
    time.sleep(0.8)
    progress.say("loading a model")
    time.sleep(1.5)
    progress.show("evaluation", 1, 4, "rte")
    time.sleep(1.5)
time.sleep(1.5)
"""


def test_long_work_without_a_word_is_named_while_it_lasts():
    """Oracle: the pauses, by hand: one sign in each, none after the end."""
    lines = run_python("-c", LONG_WORK).stdout.splitlines()
    named = [re.sub(r"\(\d+ s so far\)$", "(...)", line) for line in lines]
    assert named == ["starting (...)", "loading a model", "loading a model (...)"] + [
        "evaluation 25%  rte (...)"
    ]
