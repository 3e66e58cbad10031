"""The wheel works alone: built, installed and used where the checkout is not.

Oracle: the tree of the checkout, and the commands of an environment that has nothing else of METRO.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = {
    "metro": "metro",
    "fairseq_plugins": "fairseq_plugins",
    "checkpoints": "metro/checkpoints",
}
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE")
PYCACHE = shutil.ignore_patterns("__pycache__")
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel made of the sdist, which is made of a copy of the checkout."""
    for package in ("setuptools", "wheel"):
        pytest.importorskip(package)
    source = tmp_path_factory.mktemp("source")
    for name in INSTALLED:
        shutil.copytree(ROOT / name, source / name, ignore=PYCACHE, symlinks=True)
    for name in FILES:
        shutil.copyfile(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=source)
    (sdist,) = source.glob("dist/metro_t5-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--no-build-isolation", "--wheel-dir", source / "wheels", sdist, cwd=source)
    (wheel,) = source.glob("wheels/metro_t5-*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, in which the other packages of this one can be imported.

    A `.pth` file adds their folder to the path. Further `.pth` files in it are ignored, so that an
    editable METRO there stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


def test_an_installed_metro_has_every_file_of_the_packages(environment):
    (packages,) = environment.glob("lib/python*/site-packages")
    for source, target in INSTALLED.items():
        for path in (ROOT / source).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                installed = packages / target / path.relative_to(ROOT / source)
                assert installed.is_file(), f"add it to package-data: {path}"


def test_commands_work_outside_of_the_checkout(environment, tmp_path):
    metro = environment / "bin/metro"
    assert "metro" in run(metro, "--version", cwd=tmp_path)
    assert "finetune" in run(metro, "--help", cwd=tmp_path)
    assert "metro_t0_base" in run(metro, "models", cwd=tmp_path)
    report = json.loads(run(metro, "doctor", "--json", cwd=tmp_path))
    required = {part["name"] for part in report["parts"] if part["required"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert required | {"packaging"} == {re.split("[<>=]", n)[0] for n in project["dependencies"]}
    code = "import metro; print(metro.__file__, *metro.MetroT5Config().to_diff_dict())"
    assert str(environment) in run(environment / "bin/python", "-P", "-c", code, cwd=tmp_path)


@pytest.mark.fairseq
def test_fairseq_trains_with_the_plugins_and_configurations_of_the_wheel(environment, tmp_path):
    """Oracle: the checkpoint of two updates, converted by the same environment."""
    metro, python = environment / "bin/metro", environment / "bin/python"
    plugins = Path(run(metro, "plugins", cwd=tmp_path).strip())
    assert plugins.is_relative_to(environment)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"Document {i} says that {i * i} is the square of {i}." for i in range(400))
    )
    data = tmp_path / "data"
    options = ["--input", "text.txt", "--out", data, "--train-vocab", "200", "--workers", "1"]
    run(metro, "prepare-text", *options, cwd=tmp_path)
    run(
        python,
        *("-m", "fairseq_cli.hydra_train", "--config-dir", plugins / "configs/pretraining"),
        *("--config-name", "metro_t5_tiny", f"common.user_dir={plugins}"),
        *(f"task.data={data}", "optimization.max_update=2", "checkpoint.save_dir=run"),
        cwd=tmp_path,
    )
    checkpoint = next(tmp_path.rglob("checkpoint_last.pt"))
    run(metro, "convert", "to-hf", checkpoint, "--vocab", data, "--out", "model", cwd=tmp_path)
    assert (tmp_path / "model/config.json").is_file()
