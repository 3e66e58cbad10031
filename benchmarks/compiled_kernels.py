"""What the Triton kernels take of a GPU, from code compiled for it here: no GPU is needed.

Registers of a thread, the stack that it spills to, shared memory of a block, and ``copies``: the
instructions that copy from memory to shared memory ahead of time (``cp.async``). For sm_90 (H100
and H200), in bfloat16, at the published size: heads of 64, rows of 768.

A block has 256 threads. A multiprocessor has 65,536 registers, so that it takes one block only of
kernels with more than 128 registers, whatever their shared memory. ``before`` is of the commit
before the bias was taken out of the pipeline.

    python -m benchmarks.compiled_kernels
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import print_table, write_results

ARCHITECTURE, TYPE, DTYPE = 90, "bf16", torch.bfloat16
HEAD_WIDTH, WIDTH = 64, 768
POINTERS_OF = {
    "bias": ["bias"],
    "mask": ["key_mask", "key_range"],
    "positions": ["positions"],
    "dropout": ["query_random", "key_random"],
}
"""Pointers that are ``None`` where the input is missing, which Triton compiles as a constant."""


class Compiled(NamedTuple):
    """A kernel's needs, as the compiler says them."""

    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread: registers that are kept in memory."""
    shared: int
    """Bytes of a block."""
    copies: int
    """Instructions of ``cp.async``."""


class Launch(NamedTuple):
    """What a kernel is compiled with."""

    kernel: Any
    types: dict[str, str]
    """Of its arguments; those it lacks are ``i32``."""
    constants: dict[str, Any]
    """Values of ``constexpr`` arguments; those that the kernel lacks are left out."""
    options: dict[str, int]


def compile_kernel(launch: Launch, architecture: int) -> Compiled:
    """Compile a kernel down to machine code."""
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = launch.kernel.arg_names
    constants = {name: value for name, value in launch.constants.items() if name in names}
    kinds = {**launch.types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in names}
    aligned = {  # as pointers and strides are
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name[:2] in ("q_", "k_", "v_") or name == "D"
    }
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = compile(source, target=target, options=launch.options)
    program = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([program, "-res-usage", file.name], text=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    copies = len(re.findall(r"cp\.async\.c[ag]\.", compiled.asm["ptx"]))
    return Compiled(int(registers), int(stack), compiled.metadata.shared, copies)


def attention_launch(kernel: str, given: list[str], width: int, type_name: str) -> Launch:
    """A kernel of attention.

    Args:
        kernel: forward, query_gradient, key_gradient or bias_gradient.
        given: inputs there are: bias, mask, positions, dropout; and causal.
        width: of a head.
        type_name: as Triton names it.
    """
    from metro.ops.kernels import relative_position_attention as kernels

    types = dict.fromkeys("q k v out grad_out grad_q grad_k grad_v".split(), f"*{type_name}")
    types |= dict.fromkeys(("bias", "lse", "delta", "partials"), "*fp32")
    types |= dict.fromkeys(("key_range", "query_random", "key_random"), "*i32")
    types |= {"key_mask": "*u8", "positions": "*i64"}
    types |= dict.fromkeys(("scale", "kept_scale"), "fp32")
    constants: dict[str, Any] = {"IS_CAUSAL": "causal" in given, "K": width, "TILES": 16}
    for name, missing in POINTERS_OF.items():
        constants |= {} if name in given else dict.fromkeys(missing)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(type_name, torch.float32)
    sizes = kernels.block_sizes("bias" if kernel == "bias_gradient" else kernel, width, dtype)
    options = {option: sizes.pop(option) for option in ("num_warps", "num_stages")}
    return Launch(getattr(kernels, f"{kernel}_kernel"), types, constants | sizes, options)


def projection_launch(kernel: str, given: list[str], width: int, type_name: str) -> Launch:
    """``reduce`` or ``gradient`` of the cross-entropy of a projection; given: bias, sampling."""
    from metro.ops.kernels import linear_cross_entropy as kernels

    types = {"targets": "*i64", "streams": "*i64", "ids": "*i32"}
    types |= {"sums": "*fp32", "coefficients": "*fp32"}
    types |= dict.fromkeys(("hidden", "weight", "bias", "grad"), f"*{type_name}")
    dtype = torch.float32 if type_name == "fp32" else torch.bfloat16
    constants: dict[str, Any] = kernels.block_sizes(kernel, width, dtype)
    constants["BLOCKS_PER_PART"] = kernels.BLOCKS_PER_PART
    constants |= {} if "bias" in given else {"bias": None}
    constants |= {} if "sampling" in given else {"streams": None}
    options = {"num_warps": 8, "num_stages": 3}
    return Launch(getattr(kernels, f"{kernel}_kernel"), types, constants, options)


BEFORE = {
    "attention, forward: bias dropout": Compiled(214, 0, 131_584, 111),
    "attention, forward: dropout": Compiled(175, 0, 66_048, 15),
    "attention, query_gradient: bias dropout": Compiled(167, 0, 98_560, 74),
    "attention, query_gradient: dropout": Compiled(143, 0, 65_792, 10),
    "attention, key_gradient: bias dropout": Compiled(214, 0, 99_072, 78),
    "attention, key_gradient: dropout": Compiled(205, 0, 66_304, 14),
    "attention, bias_gradient: bias dropout": Compiled(136, 0, 73_728, 16),
    "cross-entropy, reduce: bias sampling": Compiled(255, 216, 98_304, 24),
    "cross-entropy, reduce: bias": Compiled(255, 88, 98_304, 24),
    "cross-entropy, gradient: bias": Compiled(127, 0, 98_304, 24),
}
"""Of BEFORE_COMMIT, by the same compiler: the bias was copied ahead, tiles of reduce were wider."""
BEFORE_COMMIT = "305a2ef"


def launch_of(name: str) -> Launch:
    """What a key of BEFORE names."""
    kernel, _, flags = name.partition(": ")
    of, _, kernel = kernel.partition(", ")
    if of == "attention":
        return attention_launch(kernel, flags.split(), HEAD_WIDTH, TYPE)
    return projection_launch(kernel, flags.split(), WIDTH, TYPE)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for name in BEFORE:
            found = compile_kernel(launch_of(name), ARCHITECTURE)
            rows.append({"kernel": name, **found._asdict()})
    print_table(rows, f"compiled for sm_{ARCHITECTURE}, {TYPE}")
    before = [{"kernel": name, **found._asdict()} for name, found in BEFORE.items()]
    write_results(
        "compiled_kernels", rows, before={"commit": BEFORE_COMMIT, "rows": before}, triton=version()
    )


def version() -> str:
    """Of Triton, whose compiler it is."""
    import triton

    return triton.__version__


if __name__ == "__main__":
    main()
