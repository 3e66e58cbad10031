"""What this machine has: versions, devices, optional parts.

Nothing here raises when parts are broken. `metro doctor` shows it, and benchmarks store it beside
their numbers.
"""

import importlib
import importlib.util
import logging
import os
import platform
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
    purpose: str
    required: bool
    install: str
    """Command that installs it."""
    distribution: str = ""
    """Name on PyPI where it differs from the module's."""


FAIRSEQ_INSTALL = (
    "READTHEDOCS=1 pip install --no-deps --no-build-isolation fairseq-fixed==0.12.3.1 && "
    "pip install '.[fairseq-needs]'"
)

# In the commands, "." is the folder of the project.
PARTS = [
    Part("torch", "tensors and models", True, "pip install 'torch>=2.6'"),
    Part("transformers", "model classes", True, "pip install 'transformers>=4.57,<6'"),
    Part("sentencepiece", "tokenisation", True, "pip install sentencepiece"),
    Part("numpy", "data", True, "pip install numpy"),
    Part("safetensors", "model files", True, "pip install safetensors"),
    Part("jinja2", "prompt templates", True, "pip install jinja2"),
    Part("yaml", "configurations", True, "pip install pyyaml", "PyYAML"),
    Part("matplotlib", "plots", True, "pip install matplotlib"),
    Part("fairseq", "pretraining: extra [fairseq]", False, FAIRSEQ_INSTALL, "fairseq-fixed"),
    Part("accelerate", "finetuning: extra [train]", False, "pip install '.[train]'"),
    Part("datasets", "hf: inputs: extra [train], [eval]", False, "pip install '.[train]'"),
    Part("triton", "GPU kernels: extra [triton]", False, "pip install '.[triton]'"),
    Part("liger_kernel", "alternative GPU kernels", False, "pip install liger-kernel"),
    Part("tensorboard", "training curves, live", False, "pip install tensorboard"),
    Part("pytest", "tests: extra [dev]", False, "pip install '.[dev]'"),
]


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
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=_usable_cores(),
        memory_gib=_memory_gib(),
        disk_free_gib=round(shutil.disk_usage(".").free / 2**30, 1),
        parts=parts,
    )
    _look_at_torch(environment)
    _look_at_fairseq(environment)
    return environment


def _check(part: Part) -> PartStatus:
    status = PartStatus(part.distribution or part.module, part.purpose, part.required)
    try:
        status.version = metadata.version(part.distribution or part.module)
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
    if status.error:
        status.install = part.install
    return status


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


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
