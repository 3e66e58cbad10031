"""`metro doctor` reports what is missing, broken or too old and never breaks itself."""

import json
import os
import re

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from metro import environment
from metro.cli.doctor import show_kernels
from metro.cli.main import load_command
from metro.data.text.corpus import prepare_text
from metro.environment import (
    PACKAGES,
    UsedPackage,
    declared_requirements,
    inspect_environment,
    satisfies,
)
from metro.utils.messages import UserError
from tests.processes import run_python


def test_doctor_checks_the_files_of_a_prepared_folder(text, vocab, tmp_path):
    """Oracle: one bit of the token file changed; then the file cut."""
    folder = prepare_text(
        inputs=[text], out=tmp_path / "data", vocab=vocab, num_workers=1, progress=False
    ).folder
    assert CliRunner().invoke(load_command("doctor"), [str(folder)]).exit_code == 0
    tokens = bytearray((folder / "train.bin").read_bytes())
    tokens[100] ^= 4
    for content, said in ((tokens, "train.bin was damaged"), (tokens[:-2], "bytes instead of")):
        (folder / "train.bin").write_bytes(content)
        done = CliRunner().invoke(load_command("doctor"), [str(folder)])
        assert done.exit_code == 1 and said in done.output
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing in .* has checksums"):
        load_command("doctor")([str(tmp_path / "empty")], standalone_mode=False)


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
    """Runs doctor on one part alone: exit status and report. `tmp_path` is importable.

    Extras are marked in a requirement as in the metadata of a package: ``name; extra == 'x'``.
    """
    monkeypatch.syspath_prepend(tmp_path)

    def run(part: UsedPackage, requirement: str) -> tuple[int, dict]:
        monkeypatch.setattr(environment, "PACKAGES", [part])
        declared = {part.name: Requirement(requirement)}
        monkeypatch.setattr(environment, "declared_requirements", lambda: declared)
        with pytest.raises(SystemExit) as ended:
            load_command("doctor")(["--json"])
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is (ended.value.code == 0)
        return ended.value.code, report["parts"][0]

    return run


def test_complete_environment_is_ok():
    found = inspect_environment()
    assert found.missing == []
    assert {part.name for part in found.parts if part.required} >= {"torch", "transformers"}
    assert json.loads(json.dumps(found.as_dict()))["ok"] is True
    assert found.cores >= 1 and found.disk_free_gib > 0


def test_report_does_not_name_the_kernel():
    """Results of benchmarks carry it."""
    assert os.uname().release not in json.dumps(inspect_environment().as_dict())


def test_kernels_are_listed_by_operation_and_type_with_what_is_wrong(capsys):
    """Oracle: by hand. One that works is used where it was measured to be faster."""
    rows = [
        {"operation": "attention", "type": "bfloat16", "fault": None, "gain": 1.5},
        {"operation": "attention", "type": "float16", "fault": None, "gain": 0.0},
        {"operation": "norm", "type": "bfloat16", "fault": "[it] cannot be built", "gain": 2.0},
    ]
    show_kernels(rows)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "attention bfloat16 ok yes, 1.50 times as fast",
        "attention float16 ok no, not measured here",
        "norm bfloat16 [it] cannot be built no, 2.00 times as fast",
    ]


def test_required_part_that_is_missing_or_does_not_load_is_reported_with_the_remedy(
    doctor, tmp_path
):
    (tmp_path / "broken_part.py").write_text("raise OSError('libbroken.so: cannot open')")
    code, broken = doctor(
        UsedPackage("broken-part", "tests", module="broken_part"), "broken-part>=2"
    )
    assert code == 1 and "libbroken.so" in broken["error"]
    assert broken["install"] == "pip install 'broken-part>=2'"
    code, missing = doctor(UsedPackage("missing_part", "tests"), "missing_part")
    assert code == 1 and missing["error"] == "not installed"
    assert missing["install"] == "pip install 'missing_part'"


def test_missing_optional_part_is_no_failure_and_its_extra_is_named(doctor):
    code, part = doctor(
        UsedPackage("missing_part", "tests", "train"), "missing_part; extra == 'train'"
    )
    assert code == 0 and part["required"] is False
    assert re.fullmatch(r"pip install (-e )?'.*\[train\]'", part["install"])


@pytest.mark.parametrize(
    "version, marker, code",
    [("2.5.1+cpu", "", 1), ("2.5.1", "; extra == 'x'", 0), ("2.6.0", "", 0)],
)
def test_version_below_the_minimum_is_reported_with_the_remedy(
    doctor, tmp_path, version, marker, code
):
    (tmp_path / "old_part.py").write_text("")
    (tmp_path / "old_part-1.dist-info").mkdir()
    (tmp_path / "old_part-1.dist-info/METADATA").write_text(f"Name: old_part\nVersion: {version}\n")
    ended, part = doctor(UsedPackage("old_part", "tests"), f"old_part<3,>=2.6{marker}")
    assert ended == code and part["version"] == version
    if version == "2.6.0":
        assert part["error"] is None and part["install"] is None
    else:
        assert part["error"] == "METRO needs old_part<3,>=2.6"
        assert part["install"] == "pip install 'old_part<3,>=2.6'"


@pytest.mark.parametrize(
    "version, bounds, expected",
    [
        ("2.10.1+cu128", ">=2.6", True),
        ("2.6.0a0+git1234", ">=2.6", True),
        ("2.5.9", ">=2.6", False),
        ("1.0", "", True),
        ("unknown", ">=2", True),
    ],
)
def test_versions_are_compared_as_numbers(version, bounds, expected):
    """Oracle: by hand."""
    assert satisfies(version, Requirement(f"part{bounds}")) is expected


def test_every_part_is_declared_but_the_one_to_choose():
    """Oracle: pyproject.toml, and the extras by hand."""
    declared = declared_requirements()
    assert {part.name for part in PACKAGES} - set(declared) == {"liger-kernel"}
    for part in PACKAGES:
        if part.name in declared:
            assert (declared[part.name].marker is None) is (part.extra == ""), part.name
            if part.extra:
                assert declared[part.name].marker.evaluate({"extra": part.extra}) or (
                    part.name in ("accelerate", "datasets", "tensorboard")  # of two extras
                )
    assert str(declared["transformers"].specifier) == "<6,>=5.23"


def test_broken_torch_is_reported_and_the_rest_still_shown():
    done = run_python("-c", DOCTOR_WITH_BROKEN_TORCH, code=1, env={"COLUMNS": "200"})
    assert "METRO cannot run: torch" in done.stdout
    assert "libbroken.so" in done.stdout
    assert "sentencepiece" in done.stdout
    assert "Traceback" not in done.stderr
