"""`metro doctor` reports what is missing, broken or too old and never breaks itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metro import environment
from metro.cli.main import load_command
from metro.environment import PARTS, Part, inspect_environment, satisfies

ROOT = Path(__file__).resolve().parents[2]

# Runs doctor where no shared library of torch loads.
DOCTOR_WITH_BROKEN_TORCH = """
import importlib.abc, importlib.machinery, sys

class Loader(importlib.abc.Loader):
    def exec_module(self, module):
        raise OSError("libbroken.so: cannot open shared object file")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, wanted, path=None, target=None):
        if wanted == "torch":
            return importlib.machinery.ModuleSpec(wanted, Loader())

sys.meta_path.insert(0, Finder())
sys.argv = ["metro", "doctor"]
from metro.cli.main import main
main()
"""


@pytest.fixture
def doctor(tmp_path, monkeypatch, capsys):
    """Runs doctor on these parts alone: exit status and report. `tmp_path` is importable."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(*parts: Part) -> tuple[int, dict]:
        monkeypatch.setattr(environment, "PARTS", list(parts))
        with pytest.raises(SystemExit) as ended:
            load_command("doctor")(["--json"])
        return ended.value.code, json.loads(capsys.readouterr().out)

    return run


def test_complete_environment_is_ok():
    found = inspect_environment()
    assert found.missing == []
    assert {part.module for part in PARTS if part.required} >= {"torch", "transformers"}
    assert json.loads(json.dumps(found.as_dict()))["ok"] is True
    assert found.cores >= 1 and found.disk_free_gib > 0


def test_report_does_not_name_the_kernel():
    """Results of benchmarks carry it."""
    assert os.uname().release not in json.dumps(inspect_environment().as_dict())


def test_required_part_that_is_missing_or_does_not_load_is_reported_with_the_remedy(
    doctor, tmp_path
):
    (tmp_path / "broken_part.py").write_text("raise OSError('libbroken.so: cannot open')")
    code, report = doctor(
        Part("broken_part", "broken-part>=2", "tests", True),
        Part("missing_part", "missing-part", "tests", True),
    )
    assert code == 1 and report["ok"] is False
    broken, missing = report["parts"]
    assert "libbroken.so" in broken["error"]
    assert broken["install"] == "pip install 'broken-part>=2'"
    assert missing["error"] == "not installed"
    assert missing["install"] == "pip install 'missing-part'"


def test_missing_optional_part_is_no_failure(doctor):
    code, report = doctor(Part("missing_part", "missing-part", "tests", install="make it"))
    assert code == 0 and report["ok"] is True
    assert report["parts"][0]["install"] == "make it"


@pytest.mark.parametrize(
    "version, required, code", [("2.5.1+cpu", True, 1), ("2.5.1", False, 0), ("2.6.0", True, 0)]
)
def test_version_below_the_minimum_is_reported_with_the_remedy(
    doctor, tmp_path, version, required, code
):
    (tmp_path / "old_part.py").write_text("")
    (tmp_path / "old_part-1.dist-info").mkdir()
    (tmp_path / "old_part-1.dist-info/METADATA").write_text(f"Name: old-part\nVersion: {version}\n")
    ended, report = doctor(Part("old_part", "old-part>=2.6,<3", "tests", required))
    (part,) = report["parts"]
    assert ended == code and part["version"] == version
    if version == "2.6.0":
        assert part["error"] is None and part["install"] is None
    else:
        assert part["error"] == "METRO needs old-part>=2.6,<3"
        assert part["install"] == "pip install 'old-part>=2.6,<3'"


@pytest.mark.parametrize(
    "version, bounds, expected",
    [
        ("2.6.0", ">=2.6", True),
        ("2.10.1+cu128", ">=2.6", True),
        ("2.6.0a0+git1234", ">=2.6", True),
        ("2.5.9", ">=2.6", False),
        ("5.23.0", ">=4.57,<6", True),
        ("4.56.2", ">=4.57,<6", False),
        ("6.0.0", ">=4.57,<6", False),
        ("0.12.3.1", "==0.12.3.1", True),
        ("0.12.3.2", "==0.12.3.1", False),
        ("1.0", "", True),
        ("unknown", ">=2", True),
    ],
)
def test_versions_are_compared_as_numbers(version, bounds, expected):
    """Oracle: by hand."""
    assert satisfies(version, bounds) is expected


def test_setup_takes_the_requirements_from_here(tmp_path):
    """Oracle: the metadata that setup.py makes."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    required = (tmp_path / "metro.egg-info/requires.txt").read_text().split("\n\n")[0].split()
    # The order of two bounds may differ.
    expected = [part.requirement for part in PARTS if part.required]
    assert sorted(map(sorted, required)) == sorted(map(sorted, expected))


def test_broken_torch_is_reported_and_the_rest_still_shown():
    done = subprocess.run(
        [sys.executable, "-c", DOCTOR_WITH_BROKEN_TORCH],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "METRO cannot run: torch" in done.stdout
    assert "libbroken.so" in done.stdout
    assert "sentencepiece" in done.stdout
    assert "Traceback" not in done.stderr
