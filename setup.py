"""Packaging of METRO. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "metro/__init__.py").read_text())[1]

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
    "fairseq": ["fairseq-fixed==0.12.3.1", *FAIRSEQ_NEEDS],
    "train": ["accelerate>=1.1", "datasets>=3"],
    "eval": ["datasets>=3"],
    "triton": ["triton>=3.2"],
    "dev": ["hypothesis", "pytest>=8", "pytest-xdist", "ruff"],
}

setup(
    name="metro",
    version=VERSION,
    description="Pretraining and prompt finetuning of T5-style models with model-generated signals",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="METRO developers",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["metro", "metro.*", "fairseq_plugins", "fairseq_plugins.*"]),
    package_data={"fairseq_plugins": ["configs/**/*.yaml"], "metro": ["**/*.yaml"]},
    # A lower bound only: a CUDA build of torch that is already there is never replaced.
    install_requires=[
        "torch>=2.6",
        "transformers>=4.57,<6",
        "sentencepiece>=0.2",
        "numpy>=1.26",
        "safetensors",
        "jinja2",
        "pyyaml",
        "typer>=0.12",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["metro = metro.cli.main:main"]},
)
