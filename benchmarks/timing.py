"""Time and memory of an operation's two passes, on the CPU and on a GPU.

On a GPU both passes are captured as a CUDA graph and replayed: launched one by one from Python,
small kernels are waited for longer than they run. A capture that fails leaves PyTorch's random
numbers unusable, so it is for the caller to say what can be captured.
"""

import os
import time
from collections.abc import Callable
from functools import partial

import torch

from metro.ops import dispatch
from metro.ops.linear import linear

REPLAYS = 10
"""Of a graph, between two events."""


def take_proven_kernels() -> None:
    """In this process ``auto`` takes every kernel that proves itself, measured faster or not.

    What does not is in :func:`metro.ops.kernels.self_check.known_faults`.
    """
    os.environ.pop("METRO_TRITON", None)
    dispatch.measured_gain = lambda *case: float("inf")


def outputs_of(run) -> list[torch.Tensor]:
    """Return the outputs of `run()` as a list; nothing for what works in place."""
    output = run()
    return [output] if isinstance(output, torch.Tensor) else list(output or ())


def kept_bytes(run) -> int:
    """Bytes of the distinct tensors that the graph of `run()` holds."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = outputs_of(run)
    del outputs
    return sum(storages.values())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_now(device: str) -> float:
    """Processor time on the CPU, which others disturb least; on the wall once a GPU is done."""
    synchronize(device)
    return time.perf_counter() if device == "cuda" else time.process_time()


def both_passes(run, leaves) -> None:
    """Outputs, and gradients of the leaves where there are any."""
    outputs = outputs_of(run)
    if leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def seconds_of(run, leaves, device: str) -> float:
    """Of both passes as they are launched."""
    start = seconds_now(device)
    both_passes(run, leaves)
    return seconds_now(device) - start


def timer_of(run, leaves, device: str, replayed: bool) -> Callable[[], float]:
    """Return a function that times both passes once, ``replayed`` as a graph or as launched."""
    return replay_timer(run, leaves) if replayed else partial(seconds_of, run, leaves, device)


def replay_timer(run, leaves) -> Callable[[], float]:
    """Measures the mean of some replays by the GPU's own clock."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilers and libraries set themselves up
        for _ in range(3):
            both_passes(run, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both_passes(run, leaves)

    def seconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / REPLAYS

    return seconds


def peak_bytes(run, leaves) -> int:
    """GPU memory of both passes, beyond what was there and what compiling and tuning take."""
    both_passes(run, leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds_of(run, leaves, "cuda")
    return torch.cuda.max_memory_allocated() - before


def measure_rates(device: str, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes/s, read and written, of ``x += y``; the best of eight.

    The product is one of bf16 on a GPU and of float32 on the CPU unless ``dtype`` says otherwise. A
    copy would show a lower rate on a CPU, which first reads what it then overwrites.
    """
    if device == "cpu":
        torch.set_num_threads(1)  # its clock is that of the processor
    size, usual = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    dtype = dtype or usual
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**29 if device == "cuda" else 2**24, device=device)
    target = torch.zeros_like(source)
    product = min(seconds_of(lambda: linear(a, b), [], device) for _ in range(8))
    added = min(seconds_of(lambda: target.add_(source), [], device) for _ in range(8))
    return 2 * size**3 / product, 3 * source.nbytes / added


def subject_on(device: str, subject: str) -> str:
    """Name results by the device: on CPUs AMX says more than anything else how fast bf16 is."""
    if device == "cuda":
        return f"{subject}_gpu"
    return subject if torch.cpu._is_amx_tile_supported() else f"{subject}_without_amx"
