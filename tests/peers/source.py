"""The common tests of transformers, out of its source distribution on PyPI.

They are fetched by pip into ``~/.cache/metro/peers`` once per version, and imported as the package
``transformers_tests``. Where they cannot be had, what needs them is skipped with the reason.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import pytest

VERSION = importlib.metadata.version("transformers")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "metro/peers"
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
NOT_DISTRIBUTED = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}
"""Modules that the common tests import, and that are not in a source distribution: of `tests` it
holds `test_*.py` alone. `tests/modeling/test_generation.py` holds METRO-T5 and T5 to its claims."""


def fetch() -> Path:
    """Return the folder of the tests, fetched at the first call.

    It holds what ``pip install --target`` put there too: ``parameterized``, which the tests need.
    """
    folder = CACHE / f"transformers-{VERSION}"
    if not (folder / "tests").is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            source = "download --no-binary transformers --no-deps --no-build-isolation".split()
            for command in (
                [*source, f"transformers=={VERSION}", "--dest", work],
                ["install", "--no-deps", "parameterized==0.9.0", "--target", f"{work}/made"],
            ):
                done = subprocess.run([*PIP, *command], capture_output=True, text=True, timeout=280)
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                    pytest.skip(f"transformers {VERSION}'s tests cannot be had: {reason}")
            with tarfile.open(next(Path(work).glob("transformers-*.tar.gz"))) as archive:
                archive.extractall(work, filter="data")
            sample = Path(work) / f"transformers-{VERSION}/tests"
            sample.rename(Path(work) / "made/tests")
            os.rename(Path(work) / "made", folder)
    return folder


def peer_module(name: str) -> types.ModuleType:
    """Import one of the modules of the tests, such as ``test_modeling_common``."""
    folder = fetch()
    if "transformers_tests" not in sys.modules:
        sys.path.append(str(folder))
        package = types.ModuleType("transformers_tests")
        package.__path__ = [str(folder / "tests")]
        sys.modules["transformers_tests"] = package
        for module, mixin in NOT_DISTRIBUTED.items():
            if not (folder / "tests" / f"{module.replace('.', '/')}.py").is_file():
                _stand_in(module, mixin)
    return importlib.import_module(f"transformers_tests.{name}")


def _stand_in(name: str, mixin: str) -> None:
    """Put an empty mixin where a module is not distributed."""
    parent = f"transformers_tests.{name.partition('.')[0]}"
    sys.modules.setdefault(parent, types.ModuleType(parent))
    module = types.ModuleType(f"transformers_tests.{name}")
    setattr(module, mixin, type(mixin, (), {}))
    sys.modules[module.__name__] = module


def run_peers(case: type[unittest.TestCase], not_applicable: dict[str, str]) -> None:
    """Run all tests of a class but the ones whose names start as in ``not_applicable``."""
    suite = unittest.TestSuite(
        case(name)
        for name in unittest.TestLoader().getTestCaseNames(case)
        if not name.startswith(tuple(not_applicable))
    )
    result = unittest.TestResult()
    suite.run(result)
    failed = [f"{test.id()}\n{trace}" for test, trace in result.failures + result.errors]
    run = result.testsRun - len(result.skipped)
    print(f"{case.__name__}: {run - len(failed)} of {run} passed, {len(result.skipped)} skipped")
    assert run > 20 and not failed, "\n".join(failed)
