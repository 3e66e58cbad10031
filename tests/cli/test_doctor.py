"""`metro doctor` reports what is missing, broken or too old and never breaks itself."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from packaging.requirements import Requirement

from metro import environment
from metro.cli.doctor import show_kernels, try_kernels
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
    facts = {"operation": "attention", "type": "bfloat16", "fault": None, "reason": ""}
    rows = [
        facts | {"used": ["bias", "bias mask"]},
        facts | {"type": "float16", "used": [], "reason": "not measured here"},
        facts | {"operation": "norm", "used": [], "fault": "[it] cannot be built", "reason": "no"},
    ]
    show_kernels("", rows)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "attention bfloat16 ok yes, in 2 cases",
        "attention float16 ok no, not measured here",
        "norm bfloat16 [it] cannot be built no, no",
    ]


@pytest.mark.parametrize(
    "has_gpu, has_triton, capability, reason",
    [
        (False, True, (9, 0), "no GPU"),
        (True, False, (9, 0), "the package triton is not installed"),
        (True, True, (7, 5), "the GPU is older than Ampere"),
        (True, True, (9, 0), ""),
    ],
)
def test_where_no_kernel_can_run_the_reason_is_said_and_none_is_tried(
    monkeypatch, capsys, has_gpu, has_triton, capability, reason
):
    from metro.ops import dispatch
    from metro.ops.kernels import trials

    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: has_triton)
    monkeypatch.setattr(dispatch, "compute_capability", lambda device: capability)
    monkeypatch.setattr(trials, "verdicts", lambda device: iter([{"operation": "attention"}]))
    found, rows = try_kernels(SimpleNamespace(gpus=["one"] * has_gpu))
    assert found == reason and len(rows) == (not reason)
    if reason:
        show_kernels(found, rows)
        assert capsys.readouterr().out == f"kernels: none is used: {reason}\n"


def test_what_doctor_calls_used_is_what_training_takes(monkeypatch):
    """Oracle: `takes_kernel`, for every case, with and without METRO_TRITON; a busy GPU."""
    from metro.ops import dispatch
    from metro.ops.kernels import self_check, trials

    def find_fault(op, device, dtype, width, flags):
        if dtype == torch.float32:
            raise torch.OutOfMemoryError
        return "wrong" if op == "linear_cross_entropy" else None

    gpu = torch.device("cuda", 0)
    gains = {"linear_cross_entropy bfloat16 bias": 2.0, "dropout_add_layer_norm bfloat16": 1.5}
    gains["relative_position_attention bfloat16 bias mask"] = 3.0
    monkeypatch.setattr(dispatch, "measured_gains", lambda: {"sm_9x": gains})
    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(trials, "find_fault", find_fault)
    monkeypatch.setattr(self_check, "is_trusted", lambda *case: find_fault(*case) is None)
    for setting, number in (("", 2), ("1", 34), ("0", 0)):
        monkeypatch.setenv("METRO_TRITON", setting)
        rows = {(row["operation"], row["type"]): row for row in trials.verdicts(gpu)}
        assert sum(len(row["used"]) for row in rows.values()) == number
        for (op, name), row in rows.items():
            if name == "float32":
                assert row["fault"] == row["reason"] == "not tried: the GPU has no memory left"
                continue
            taken = [
                " ".join(flags)
                for flags in trials.TRAINED[op]
                if dispatch.takes_kernel(op, gpu, getattr(torch, name), 64, *flags)
            ]
            assert row["used"] == taken and (row["reason"] == "") == (
                " ".join(trials.TRAINED[op][0]) in taken
            )
    assert rows["linear_cross_entropy", "bfloat16"]["fault"] == "wrong"
    monkeypatch.setenv("METRO_TRITON", "off")
    with pytest.raises(UserError, match="METRO_TRITON is 'off'"):
        try_kernels(SimpleNamespace(gpus=["one"]))


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
