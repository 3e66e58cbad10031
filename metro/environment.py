"""Facts about this machine: versions, devices, optional packages.

Nothing here raises if packages are broken. `metro doctor` shows the facts, and benchmarks store
them beside their numbers.
"""

import importlib
import importlib.util
import logging
import os
import platform
import shutil
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

import metro
from metro.utils.messages import DISTRIBUTION, install_command
from metro.utils.worker_pool import available_cores


@dataclass(frozen=True)
class UsedPackage:
    """A package that METRO uses."""

    name: str
    """Name on PyPI; pyproject.toml states the versions, and whether METRO requires it."""
    purpose: str
    extra: str = ""
    """Extra of METRO that installs it."""
    module: str = ""
    """Name to import, if it differs."""


PACKAGES = [
    UsedPackage("torch", "tensors and models"),
    UsedPackage("transformers", "model classes"),
    UsedPackage("sentencepiece", "tokenisation"),
    UsedPackage("numpy", "data"),
    UsedPackage("safetensors", "model files"),
    UsedPackage("protobuf", "tokenizers of T5", module="google.protobuf"),
    UsedPackage("jinja2", "prompt templates"),
    UsedPackage("pyyaml", "configurations", module="yaml"),
    UsedPackage("matplotlib", "plots"),
    UsedPackage("click", "command line"),
    UsedPackage("rich", "tables and progress"),
    UsedPackage("fairseq-fixed", "training with fairseq", "fairseq", module="fairseq"),
    UsedPackage("accelerate", "pretraining, finetuning", "train"),
    UsedPackage("datasets", "datasets of the hub", "train"),
    UsedPackage("peft", "adapters as models", "peft"),
    UsedPackage("lm_eval", "lm-evaluation-harness", "lm-eval"),
    UsedPackage("triton", "GPU kernels", "triton"),
    UsedPackage("liger-kernel", "alternative GPU kernels", module="liger_kernel"),
    UsedPackage("tensorboard", "training curves, live", "train"),
    UsedPackage("pytest", "tests", "dev"),
]


@dataclass
class PackageStatus:
    """State of one package."""

    name: str
    purpose: str
    required: bool
    version: str | None = None
    error: str | None = None
    """Reason why it cannot be used, None if it can."""
    install: str | None = None
    """Command that installs it, None if it can be used."""


@dataclass
class Environment:
    """Everything `metro doctor` shows."""

    metro: str
    python: str
    platform: str
    """System and architecture."""
    cpu: str
    cores: int
    """Cores this process may use."""
    memory_gib: float | None
    disk_free_gib: float
    """In the working directory."""
    cuda: str | None = None
    """CUDA version torch was built for, None for a CPU build."""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    parts: list[PackageStatus] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[PackageStatus]:
        """Required packages that cannot be used."""
        return [part for part in self.parts if part.required and part.error]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.missing}


def inspect_environment() -> Environment:
    """Inspect this machine; imports torch and fairseq to see whether they really load."""
    logging.disable(logging.WARNING)  # fairseq logs while it is imported
    try:
        declared = declared_requirements()
        parts = [_check(part, declared.get(part.name)) for part in PACKAGES]
    finally:
        logging.disable(logging.NOTSET)
    environment = Environment(
        metro=metro.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        cores=available_cores(),
        memory_gib=_memory_gib(),
        disk_free_gib=round(shutil.disk_usage(".").free / 2**30, 1),
        parts=parts,
    )
    _look_at_torch(environment)
    return environment


def declared_requirements() -> dict[str, Requirement]:
    """Read METRO's requirements from pyproject.toml in a checkout, else from the wheel's metadata.

    Returns:
        Name on PyPI -> requirement; those of extras have a marker.
    """
    lines: Iterable[str]
    project_file = Path(metro.__file__).parents[1] / "pyproject.toml"
    if project_file.is_file():
        project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
        lines = [
            *(
                f"{line}; extra == '{extra}'"
                for extra, names in project["optional-dependencies"].items()
                for line in names
            ),
            *project["dependencies"],
        ]
    else:
        # A requirement without an extra comes last, so that it overwrites those of extras.
        lines = sorted(metadata.requires(DISTRIBUTION) or (), key=lambda line: ";" not in line)
    return {(requirement := Requirement(line)).name: requirement for line in lines}


def _check(part: UsedPackage, requirement: Requirement | None) -> PackageStatus:
    required = requirement is not None and requirement.marker is None
    needed = f"{part.name}{requirement.specifier if requirement else ''}"
    module = part.module or part.name
    status = PackageStatus(part.name, part.purpose, required)
    try:
        status.version = metadata.version(part.name)
    except metadata.PackageNotFoundError:
        pass
    try:
        if importlib.util.find_spec(module) is None:
            status.error = "not installed"
        elif required or module == "fairseq":
            # Only an import tells whether shared libraries load; the optional rest is too slow.
            imported = importlib.import_module(module)
            status.version = status.version or getattr(imported, "__version__", None)
    except (Exception, SystemExit) as error:  # a broken package may raise anything
        status.error = f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    if not status.error and status.version and requirement:
        if not satisfies(status.version, requirement):
            status.error = f"METRO needs {needed}"
    if status.error:
        status.install = install_command(part.extra) if part.extra else f"pip install '{needed}'"
        if module == "fairseq":  # without its extensions, which take minutes to compile
            flags = "--no-deps --no-build-isolation"
            pure = f"READTHEDOCS=1 pip install {flags} {needed}"
            status.install = f"{pure} && {install_command('fairseq-needs')}"
    return status


def satisfies(version: str, requirement: Requirement) -> bool:
    """Tell whether an installed version meets a requirement.

    Only its release numbers count: ``2.6.0a0+cu128`` is 2.6.0. An unreadable version passes.
    """
    try:
        return requirement.specifier.contains(Version(version).base_version)
    except InvalidVersion:
        return True


def _look_at_torch(environment: Environment) -> None:
    try:
        import torch

        environment.cuda = torch.version.cuda
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            environment.gpus.append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "capability": f"{properties.major}.{properties.minor}",
                    "bf16": properties.major >= 8,
                }
            )
    except Exception as error:
        environment.notes.append(f"devices unknown: {type(error).__name__}: {error}")
        return
    if environment.cuda and not environment.gpus:
        environment.notes.append(
            f"torch is built for CUDA {environment.cuda} but sees no GPU: check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES"
        )


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
