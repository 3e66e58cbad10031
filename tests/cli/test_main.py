"""The `metro` command as a user meets it: run in a process of its own."""

import os
import re
import subprocess
import sys
import time

import pytest

import metro
from metro.cli.main import COMMANDS, load_command

METRO = [sys.executable, "-m", "metro.cli.main"]


def run_metro(*args: str, **env: str) -> subprocess.CompletedProcess:
    # NO_COLOR and a wide terminal keep the text in one piece.
    env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **env}
    return subprocess.run([*METRO, *args], capture_output=True, text=True, env=env, timeout=120)


def test_help_lists_every_command_and_is_fast():
    """Oracle: the table of commands; half a second of processor time (not of a busy machine)."""
    before = os.times()
    done = run_metro("--help")
    after = os.times()
    assert done.returncode == 0, done.stderr
    for name, (_, line) in COMMANDS.items():
        assert name in done.stdout
        assert line.split(",")[0] in done.stdout
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_starts_fast(name):
    start = time.process_time()
    command = load_command(name)
    assert command.help and command.help.strip()
    assert time.process_time() - start < 0.5, "import heavy modules inside the function"
    done = run_metro(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"metro.cli.main {name}" in done.stdout


def test_version_is_the_package_version():
    assert run_metro("--version").stdout.strip() == f"metro {metro.__version__}"


def test_unknown_command_is_refused_by_name():
    done = run_metro("no-such-command")
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


BROKEN_COMMAND = """
import sys, types
from metro.cli import main
def broken() -> None:
    raise ValueError("size is [3]; use 4")
sys.modules["broken"] = types.SimpleNamespace(broken=broken)
main.COMMANDS["broken"] = ("broken:broken", "Fails.")
sys.argv = ["metro", "broken"]
main.main()
"""


@pytest.mark.parametrize("debug", [False, True])
def test_user_errors_are_one_line_unless_debugging(debug):
    env = {**os.environ, "METRO_DEBUG": "1" if debug else ""}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_COMMAND], capture_output=True, text=True, env=env
    )
    if debug:
        assert "Traceback" in done.stderr and done.returncode == 1
    else:
        assert done.stderr.strip() == "error: size is [3]; use 4"
        assert done.returncode == 2


def test_public_names_exist():
    for name in metro.__all__:
        assert getattr(metro, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = metro.nothing


@pytest.mark.parametrize("name", ["generate", "finetune", "evaluate"])
def test_help_names_every_option_in_full_on_a_narrow_terminal(name):
    """Oracle: the options of the command itself."""
    done = run_metro(name, "--help", COLUMNS="80")
    for parameter in load_command(name).params:
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert re.search(rf"^ +{option}\b", done.stdout, re.M), option
    assert max(map(len, done.stdout.splitlines())) <= 80
