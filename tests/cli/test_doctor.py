"""`metro doctor` reports what is missing or broken and never breaks itself."""

import json
import os
import subprocess
import sys

import pytest

from metro.environment import PARTS, inspect_environment

# Runs doctor where the package named first cannot be imported, in the way named second.
DOCTOR_WITHOUT = """
import importlib.abc, importlib.machinery, sys
name, how = {name!r}, {how!r}

class Loader(importlib.abc.Loader):
    def exec_module(self, module):
        raise OSError("libbroken.so: cannot open shared object file")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, wanted, path=None, target=None):
        if wanted.split(".")[0] == name:
            if how == "missing":
                raise ModuleNotFoundError("No module named " + name)
            return importlib.machinery.ModuleSpec(wanted, Loader())

sys.meta_path.insert(0, Finder())
sys.argv = ["metro", "doctor", *{options!r}]
from metro.cli.main import main
main()
"""


def doctor_without(name: str, how: str, *options: str) -> subprocess.CompletedProcess:
    code = DOCTOR_WITHOUT.format(name=name, how=how, options=options)
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300
    )


def test_complete_environment_is_ok():
    environment = inspect_environment()
    assert environment.missing == []
    assert {part.module for part in PARTS if part.required} >= {"torch", "transformers"}
    assert json.loads(json.dumps(environment.as_dict()))["ok"] is True
    assert environment.cores >= 1 and environment.disk_free_gib > 0


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_required_part_that_does_not_load_is_reported_with_the_remedy(how):
    done = doctor_without("sentencepiece", how, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    part = next(part for part in report["parts"] if part["name"] == "sentencepiece")
    assert report["ok"] is False
    assert part["install"] == "pip install sentencepiece"
    if how == "broken":
        assert "libbroken.so" in part["error"]


def test_broken_torch_is_reported_and_the_rest_still_shown():
    done = doctor_without("torch", "broken")
    assert done.returncode == 1, done.stderr
    assert "METRO cannot run: torch" in done.stdout
    assert "libbroken.so" in done.stdout
    assert "sentencepiece" in done.stdout
    assert "Traceback" not in done.stderr


def test_missing_optional_part_is_no_failure():
    done = doctor_without("fairseq", "missing")
    assert done.returncode == 0, done.stderr
    assert "READTHEDOCS=1 pip install" in done.stdout
