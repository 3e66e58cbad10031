"""One writer at a time, and no lock that outlives its process."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from metro.utils import locks
from metro.utils.files import new_file, new_folder
from metro.utils.locks import locked
from metro.utils.messages import UserError

HOLD = "import sys, pathlib, metro.utils.locks as l\nwith l.locked(pathlib.Path(sys.argv[1])):\n"


def start(out, *lines):
    """A process that holds ``out`` and says so."""
    code = HOLD + "".join(f"    {line}\n" for line in ("print(1, flush=True)", *lines))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n"
    return process


def stop(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("write", [locked, new_file, new_folder])
def test_the_second_process_names_the_first_which_a_kill_frees(tmp_path, write):
    """Oracle: another process, its number and this machine's name."""
    out = tmp_path / "new/out"
    process = start(out, "import time; time.sleep(60)")
    says = rf"out is being written by process {process.pid} on {socket.gethostname()} since 20"
    with pytest.raises(UserError, match=says), write(out):
        pass
    stop(process)
    with write(out):
        assert (out.parent / ".out.lock").is_file()
    assert [path.name for path in out.parent.iterdir()] == ([] if write is locked else ["out"])


def test_one_process_does_not_hold_an_output_twice(tmp_path):
    """POSIX locks alone would let it, and the second one's end would free the first."""
    with locked(tmp_path, inside=True):
        with pytest.raises(UserError, match="by this very process"), locked(tmp_path, inside=True):
            pass
        code = HOLD.replace("[1])", "[1]), inside=True") + "    pass"
        other = [sys.executable, "-c", code, str(tmp_path)]
        said = subprocess.run(other, stderr=subprocess.PIPE, text=True).stderr
        assert f"is being written by process {os.getpid()} on" in said
    assert list(tmp_path.iterdir()) == []


def test_never_two_holders_though_the_file_comes_and_goes(tmp_path):
    """Oracle: a file that each holder makes, and finds absent."""
    again = (
        "import pathlib, sys, metro.utils.locks as l\nout, num = pathlib.Path(sys.argv[1]), 0\n"
        "while num < 50:\n try:\n  with l.locked(out):\n   mark = out.with_name('mark')\n"
        "   mark.touch(exist_ok=False); mark.unlink(); num += 1\n except l.UserError: pass\n"
    )
    again = "import time; time.sleep = lambda _: None\n" + again
    others = [subprocess.Popen([sys.executable, "-c", again, tmp_path / "out"]) for _ in range(3)]
    assert [process.wait(60) for process in others] == [0, 0, 0]


def test_without_locks_of_the_file_system_this_machine_s_processes_see_each_other(
    tmp_path, monkeypatch
):
    """Oracle: the same steps where the system refuses every lock."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    process = start(tmp_path / "out", "import time; time.sleep(60)")
    with pytest.raises(UserError, match=f"process {process.pid} on"), locked(tmp_path / "out"):
        pass
    stop(process)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{process.pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
