"""Helpers of the tests of Triton kernels: where they run, the interpreter, the compiler.

Kernels run on a GPU, or in Triton's interpreter, which has to be chosen before Triton is imported:
without a GPU a file's tests are run again in a process of their own.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

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


def compile_kernel(kernel, types, constants, architecture, **launch) -> tuple[int, int]:
    """Compile a kernel down to machine code, which fits; no GPU is needed.

    Returns:
        bytes of shared memory of a block, and of registers that a thread keeps in memory.

    Args:
        types: of arguments; those it lacks are ``i32``.
        constants: values of ``constexpr`` arguments; those that the kernel lacks are left out.
    """
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    kinds = {**types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in names}
    aligned = {  # as pointers and strides are
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name[:2] in ("q_", "k_", "v_") or name == "D"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED_MEMORY[architecture]
    program = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([program, "-res-usage", file.name], text=True)
    return compiled.metadata.shared, int(re.findall(r"STACK:(\d+)", usage)[0])
