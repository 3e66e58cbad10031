"""Helpers of the tests of Triton kernels: where they run, the interpreter, the compiler.

Kernels run on a GPU, or in Triton's interpreter, which has to be chosen before Triton is imported:
without a GPU a file's tests are run again in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.compiled_kernels import Compiled, Launch, compile_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a block may have, by architecture."""

runs = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs a GPU or TRITON_INTERPRET=1")


def assert_passes_in_the_interpreter(file: str, timeout: int) -> None:
    """All tests of a file, in a process that imports Triton with its interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def compile_and_fit(launch: Launch, architecture: int) -> Compiled:
    """Compile a kernel down to machine code, whose shared memory fits; no GPU is needed."""
    compiled = compile_kernel(launch, architecture)
    assert compiled.shared <= SHARED_MEMORY[architecture]
    return compiled
