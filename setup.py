"""Packaging of METRO. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip does not put it there
from metro import __version__  # noqa: E402
from metro.environment import PARTS, REQUIREMENTS  # noqa: E402, imports the standard library alone

# What fairseq imports at start-up. Its own list adds torchaudio, cffi, Cython and regex, which it
# does not need to train text models; torchaudio alone fails to load beside many torch releases.
FAIRSEQ_NEEDS = [
    "bitarray",
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "packaging",
    "sacrebleu>=1.4.12",
    "scikit-learn",
    "tensorboard",
    "tqdm",
]

EXTRAS = {
    # `make install` takes "fairseq-needs" and a pure-Python fairseq (10 seconds); "fairseq" is for
    # those who install by hand and compiles its optional extensions (3 to 6 minutes).
    "fairseq-needs": FAIRSEQ_NEEDS,
    "fairseq": [REQUIREMENTS["fairseq"], *FAIRSEQ_NEEDS],
    "train": [REQUIREMENTS["accelerate"], REQUIREMENTS["datasets"]],
    "eval": [REQUIREMENTS["datasets"]],
    # A lower bound only: every CUDA build of torch brings the triton that belongs to it.
    "triton": [REQUIREMENTS["triton"]],
    "docs": ["mkdocs>=1.6,<2", "mkdocstrings-python>=2"],
    "dev": ["hypothesis", REQUIREMENTS["peft"], REQUIREMENTS["pytest"], "pytest-xdist", "ruff"],
}


class BuildWithRegistry(build_py):
    """Puts the registry of released checkpoints, which lies outside the package, inside it."""

    def run(self):
        super().run()
        if self.editable_mode:  # the checkout itself is used, registry included
            return
        target = Path(self.build_lib) / "metro" / "checkpoints"
        self.mkpath(str(target))
        for source in sorted((ROOT / "checkpoints").glob("*.*")):
            if source.suffix in (".yaml", ".md"):
                self.copy_file(str(source), str(target))


setup(
    name="metro",
    version=__version__,
    description="Pretraining and prompt finetuning of T5-style models with model-generated signals",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="METRO developers",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["metro", "metro.*", "fairseq_plugins", "fairseq_plugins.*"]),
    package_data={
        "metro": [f"**/*.{kind}" for kind in ("yaml", "json", "csv", "html", "css", "js")],
        "fairseq_plugins": ["configs/**/*.yaml"],
    },
    install_requires=[part.requirement for part in PARTS if part.required],
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildWithRegistry},
    entry_points={"console_scripts": ["metro = metro.cli.main:main"]},
)
