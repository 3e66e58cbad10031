"""Python and `metro` run in processes of their own."""

import os
import subprocess
import sys

from tests.conftest import ROOT

METRO = ("-m", "metro.cli.main")


def run_python(*arguments: object, code: int | None = 0, **options) -> subprocess.CompletedProcess:
    """Run Python, which finds this METRO; `env` adds to the environment.

    The exit status has to be `code`; None takes any.
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
    assert code is None or done.returncode == code, done.stderr[-4000:]
    return done
