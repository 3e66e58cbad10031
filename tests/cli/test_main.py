"""The `metro` command as a user meets it: run in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import metro
from metro.cli.main import COMMANDS, load_command
from metro.utils.messages import UserError
from tests.processes import METRO, run_python


def run_metro(*args: str, **env: str) -> subprocess.CompletedProcess:
    # NO_COLOR and a wide terminal keep the text in one piece.
    return run_python(*METRO, *args, code=None, env={"NO_COLOR": "1", "COLUMNS": "200", **env})


def test_help_lists_every_command_in_order():
    """Oracle: the table of commands."""
    done = run_metro("--help", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  ([a-z-]+) +(\S.*)$", done.stdout.split("Text to data:")[1], re.M)
    assert listed == [(name, line) for name, (_, line) in COMMANDS.items()]


HELP = """
import sys
from metro.cli.main import main
sys.argv = ["metro", *sys.argv[1:]]
try:
    main()
finally:
    print(sorted({"torch", "transformers", "numpy", "rich"} & set(sys.modules)))
"""


@pytest.mark.parametrize("name", ["--help", *COMMANDS])
def test_help_is_fast(name):
    """Oracle: the slow modules that the process has imported."""
    arguments = [] if name == "--help" else [name]
    done = run_python("-c", HELP, *arguments, "--help")
    assert done.stdout.startswith("Usage: metro")
    slow = {"torch", "transformers"} if arguments else {"torch", "transformers", "numpy", "rich"}
    assert not slow & set(re.findall(r"\w+", done.stdout.splitlines()[-1]))


GARBAGE = """
import atexit, gc, sys
import metro
passes = []
gc.callbacks.append(lambda phase, info: passes.append(phase))
import metro.data.own_rows
print(len(passes), gc.isenabled())
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from metro.cli.main import main
sys.argv = ["metro", "--version"]
main()
"""


def test_start_and_end_spend_no_time_on_garbage():
    """Oracle: the collector's passes, some 70 where imports are not spared, and what it leaves."""
    first, _, last = run_python("-c", GARBAGE).stdout.splitlines()
    passes, is_enabled = first.split()
    assert int(passes) < 10 and is_enabled == "True"
    assert last == "True"


def test_version_is_the_package_version():
    assert run_metro("--version").stdout.strip() == f"metro {metro.__version__}"


def test_unknown_command_is_refused_by_name():
    done = run_metro("no-such-command")
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


BROKEN_COMMAND = """
import sys, types
import click
from metro.cli import main
from metro.utils.messages import MissingPackage, UserError
@click.command()
def broken():
    {statement}
sys.modules["metro.cli.broken"] = types.SimpleNamespace(command=broken)
main.COMMANDS["broken"] = ("broken:command", "Fails.")
sys.argv = ["metro", "broken"]
main.main()
"""


def run_broken(statement: str, **env: str) -> subprocess.CompletedProcess:
    script = BROKEN_COMMAND.format(statement=statement)
    return run_python("-c", script, code=None, env={"METRO_DEBUG": "", **env})


def test_user_errors_are_one_line_unless_debugging():
    statement = "raise UserError('size is [3]; use 4')"
    done = run_broken(statement)
    assert (done.stderr, done.returncode) == ("error: size is [3]; use 4\n", 2)
    debugged = run_broken(statement, METRO_DEBUG="1")
    assert "Traceback" in debugged.stderr and debugged.returncode == 2
    assert debugged.stderr.endswith("error: size is [3]; use 4\n")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("open('no/such/file')", "no/such/file does not exist: correct the path"),
        ("open('.')", ". is a folder: name a file"),
        ("import os; os.listdir(sys.executable)", f"{sys.executable} is not a folder"),
        ("import os; os.makedirs('.')", ". exists already"),
        ("open('n' * 300, 'w')", "has too long a name"),
        ("open('/dev/full', 'w', 1).write('a\\n')", "cannot be written, the disk is full"),
        ("import errno; raise OSError(errno.EROFS, '', 'a')", "a is on a read-only file system"),
        ("import errno; raise OSError(errno.EACCES, '', 'a')", "a may not be read or written"),
        ("raise MissingPackage('this', 'peft', 'dev')", "this needs the package peft: pip install"),
        ("raise MemoryError", "out of memory: use smaller batches"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_file_and_remedy(statement, message):
    """Oracle: the errors that the operating system itself raises, where it can be made to."""
    done = run_broken(statement)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "list(zip([1], [1, 2], strict=True))",
        "import torch; torch.ones(2, 3) @ torch.ones(2, 3)",
        "import no_such_module",
        "raise OSError('nothing that a user did')",
    ],
)
def test_a_fault_of_ours_keeps_its_traceback_and_is_called_one(statement):
    """Oracle: errors that no option of a user causes."""
    done = run_broken(statement)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    *_, last = done.stderr.splitlines()
    assert last.startswith("This is a fault of METRO's, not of yours: please report it")
    for name in ("metro", "python", "torch", "transformers"):
        assert re.search(rf"{name} \d", last)


def test_interruptions_have_a_status_of_their_own():
    done = run_broken("raise KeyboardInterrupt")
    assert (done.stderr.strip(), done.returncode) == ("interrupted", 130)


def test_plugins_are_where_fairseq_finds_them(monkeypatch):
    """Oracle: the files; fairseq is not imported for it."""
    for options, file in (([], "models/metro_t5.py"), (["--configs"], "pretraining")):
        assert (Path(run_metro("plugins", *options).stdout.strip()) / file).exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="fairseq_plugins.* is not installed; install METRO again"):
        load_command("plugins")([], standalone_mode=False)
