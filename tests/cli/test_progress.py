"""How commands that can be continued show their progress, and how they end."""

import pytest
import typer
from rich.progress import TextColumn

from metro.cli.progress import Work


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to continue"),
        (RuntimeError("a worker [died]"), 1, "error: a worker [died]"),
    ],
)
def test_an_interruption_is_one_line_and_an_exit_code(capsys, error, code, message):
    with pytest.raises(typer.Exit) as caught, Work():
        raise error
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == message + "\n"


def test_what_is_refused_before_any_progress_leaves_no_bar(capsys):
    with pytest.raises(ValueError, match="wrong"), Work(TextColumn("{task.description}")):
        raise ValueError("wrong")
    assert capsys.readouterr().err == ""


def test_bars_have_names_and_end_where_the_work_ended(capsys):
    """Claim: a bar per name; the last state is shown however fast the work was."""
    with Work(TextColumn("{task.description} {task.completed}/{task.total}")) as work:
        for done in range(3):
            work.show("reading", completed=done, total=2)
        work.show("all", description="writing", completed=1, total=1)
    assert capsys.readouterr().err.split() == ["reading", "2/2", "writing", "1/1"]
