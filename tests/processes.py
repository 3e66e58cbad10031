"""Python and `metro` run in processes of their own."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT

METRO = ("-m", "metro.cli.main")


def run_python(*arguments: object, code: int | None = 0, **options) -> subprocess.CompletedProcess:
    """Run Python, which finds this METRO; `env` adds to the environment.

    The exit status has to be `code`; None takes any. That a busy machine was slow to start is not
    a part of what was said.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **options.pop("env", {})}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        **{"timeout": 300, **options},
    )
    done.stderr = re.sub(r"^.* \(\d+ s so far\)\n", "", done.stderr, flags=re.M)
    assert code is None or done.returncode == code, done.stderr[-4000:]
    return done
