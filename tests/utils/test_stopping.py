"""A request to stop is heard whatever the process is doing, and a second one ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from metro.utils.stopping import Stop
from tests.conftest import ROOT

# A computation within which Python runs no handler, as it does not within a backward pass.
WORK = """
import hashlib, sys
from metro.utils.stopping import Stop
stop = Stop()
with stop.listen("stopping soon"):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
    print("ended", stop.signal.name, stop.status, flush=True)
"""


def begin(rounds: int) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK.format(rounds=rounds)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_ends_the_process_within_an_operation_of_minutes(signum):
    """Oracle: the clock; the first one is answered, and the same one passed on does not count."""
    process = begin(10**9)
    for pause in (0.1, 1.5, 0):
        process.send_signal(signum)
        time.sleep(pause)
    out, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signum and out == ""
    name = signal.Signals(signum).name
    assert said.splitlines() == [
        f"{name}: stopping soon (again: at once, without saving)",
        f"{name} again: stopped at once",
    ]


def test_a_single_request_is_seen_after_the_operation():
    process = begin(2_000_000)
    process.terminate()
    out, said = process.communicate(timeout=60)
    assert out == "ended SIGTERM 143\n" and "SIGTERM: stopping soon" in said
    assert process.returncode == 0


def test_a_forked_process_is_ended_by_its_parent_alone():
    """A data loader's process, when torchrun, Slurm or a terminal signal all processes of a run."""
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    heard, said = os.pipe()
    with stop.listen("stopping soon"):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.write(said, b"-")
            time.sleep(30)
            os._exit(1)
        assert os.read(heard, 1) == b"-"
        subprocess.run(["kill", "-TERM", str(child)], check=True)
        time.sleep(0.5)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    for end in (heard, said):
        os.close(end)
    assert not stop.requested_here and signal.getsignal(signal.SIGTERM) == before
