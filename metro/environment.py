"""What this machine has: versions, devices, optional parts.

Nothing here raises when parts are broken. `metro doctor` shows it, and benchmarks store it beside
their numbers.
"""

import importlib
import importlib.util
import logging
import operator
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import metro


@dataclass(frozen=True)
class Part:
    """A package that METRO uses."""

    module: str
    """Name to import."""
    requirement: str
    """Name on PyPI and versions, as pip and setup.py take it."""
    purpose: str
    required: bool = False
    install: str = ""
    """Command that installs it, where that is not ``pip install`` of the requirement."""

    @property
    def distribution(self) -> str:
        return re.match(r"[\w.-]+", self.requirement)[0]

    @property
    def bounds(self) -> str:
        return self.requirement.removeprefix(self.distribution)


FAIRSEQ = "fairseq-fixed==0.12.3.1"
FAIRSEQ_INSTALL = (
    f"READTHEDOCS=1 pip install --no-deps --no-build-isolation {FAIRSEQ} && "
    "pip install '.[fairseq-needs]'"
)

# setup.py takes the requirements from here, so that they are written once. In the commands, "." is
# the folder of the project. torch has a lower bound only: a CUDA build that is there stays.
PARTS = [
    Part("torch", "torch>=2.6", "tensors and models", True),
    Part("transformers", "transformers>=4.57,<6", "model classes", True),
    Part("sentencepiece", "sentencepiece>=0.2", "tokenisation", True),
    Part("numpy", "numpy>=1.26", "data", True),
    Part("safetensors", "safetensors", "model files", True),
    Part("jinja2", "jinja2", "prompt templates", True),
    Part("yaml", "pyyaml", "configurations", True),
    Part("matplotlib", "matplotlib>=3.8", "plots", True),
    Part("typer", "typer>=0.12", "command line", True),
    Part("rich", "rich>=13", "tables and progress", True),
    Part("fairseq", FAIRSEQ, "pretraining: extra [fairseq]", False, FAIRSEQ_INSTALL),
    Part("accelerate", "accelerate>=1.1", "finetuning: extra [train]"),
    Part("datasets", "datasets>=3", "hf: inputs: extra [train], [eval]"),
    Part("peft", "peft>=0.17", "LoRA adapters: extra [dev]"),
    Part("triton", "triton>=3.2", "GPU kernels: extra [triton]"),
    Part("liger_kernel", "liger-kernel", "alternative GPU kernels"),
    Part("tensorboard", "tensorboard", "training curves, live"),
    Part("pytest", "pytest>=8", "tests: extra [dev]"),
]
REQUIREMENTS = {part.module: part.requirement for part in PARTS}


@dataclass
class PartStatus:
    """How one package was found."""

    name: str
    purpose: str
    required: bool
    version: str | None = None
    error: str | None = None
    """Why it cannot be used, None if it can."""
    install: str | None = None
    """What to type, None if nothing is to be done."""


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
    parts: list[PartStatus] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[PartStatus]:
        """Required parts that cannot be used."""
        return [part for part in self.parts if part.required and part.error]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.missing}


def inspect_environment() -> Environment:
    """Look at this machine; imports torch and fairseq to see whether they really load."""
    logging.disable(logging.WARNING)  # fairseq talks while it is imported
    try:
        parts = [_check(part) for part in PARTS]
    finally:
        logging.disable(logging.NOTSET)
    environment = Environment(
        metro=metro.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=available_cores(),
        memory_gib=_memory_gib(),
        disk_free_gib=round(shutil.disk_usage(".").free / 2**30, 1),
        parts=parts,
    )
    _look_at_torch(environment)
    _look_at_fairseq(environment)
    return environment


def _check(part: Part) -> PartStatus:
    status = PartStatus(part.distribution, part.purpose, part.required)
    try:
        status.version = metadata.version(part.distribution)
    except metadata.PackageNotFoundError:
        pass
    try:
        if importlib.util.find_spec(part.module) is None:
            status.error = "not installed"
        elif part.required or part.module == "fairseq":
            # Only an import tells whether shared libraries load; the optional rest is too slow.
            module = importlib.import_module(part.module)
            status.version = status.version or getattr(module, "__version__", None)
    except (Exception, SystemExit) as error:  # a broken package may raise anything
        status.error = f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    if not status.error and status.version and not satisfies(status.version, part.bounds):
        status.error = f"METRO needs {part.requirement}"
    if status.error:
        status.install = part.install or f"pip install '{part.requirement}'"
    return status


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ``>=4.57,<6``.

    Numbers alone count: ``2.6.0a0+cu128`` is 2.6.0. Where there are none, anything is within.
    """
    compare = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    found = release_numbers(version)
    return not found or all(
        compare[sign](found, release_numbers(number))
        for sign, number in re.findall(r"(>=|==|<)([\d.]+)", bounds)
    )


def release_numbers(version: str) -> tuple[int, ...]:
    """(2, 6) of ``2.6.0+cpu``: without zeros at the end, so that 2.6 equals 2.6.0."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


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


def _look_at_fairseq(environment: Environment) -> None:
    try:
        spec = importlib.util.find_spec("fairseq")
        if spec is None or spec.origin is None:
            return
        compiled = bool(list(Path(spec.origin).parent.glob("data/data_utils_fast*.so")))
    except Exception:
        return
    environment.notes.append(
        "fairseq: Cython parts present"
        if compiled
        else "fairseq: pure Python, its Cython parts are absent and not needed"
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
