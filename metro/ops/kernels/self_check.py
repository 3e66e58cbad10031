"""Kernels prove themselves on the GPU they are to run on, before ``auto`` chooses one.

A kernel can fail to be built (no C compiler in a slim image), fail to be launched, or compute
something wrong on a GPU or with a compiler that nobody has tried. So the first time that one is
asked for, it computes a small awkward input, forward and backward, beside its formula in PyTorch.
"""

import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

SLACK = 2e-6
"""Relative error allowed at least: sums in float32, in another order."""
FLOOR = 1 / 2
"""Share of the largest row's norm. In the interpreter right kernels then err by a third of what is
allowed at most, in float16 and float32. Below 1/8 a query that sees one key alone would fail: its
gradient is 0, the difference of two large numbers that are rounded."""


class Trial(NamedTuple):
    """A small input of an operation."""

    leaves: dict[str, torch.Tensor]
    kernel: Callable[..., list[torch.Tensor]]
    """From the leaves to outputs; the same draws after the same seed."""
    formula: Callable[..., list[torch.Tensor]]
    """The same in PyTorch's operations, of any type, with what the kernel drew."""
    shares: tuple[torch.Tensor, torch.Tensor, int] | None = None
    """Observed and expected shares of the kernel's draws, and the number of draws."""


Case = tuple[str, torch.device, torch.dtype, int, tuple[str, ...]]
"""Operation, device, type, width, and which of its optional inputs there are."""

_faults: dict[Case, str | None] = {}


def is_trusted(
    op: str, device: torch.device, dtype: torch.dtype, width: int, flags: tuple[str, ...]
) -> bool:
    """Check whether a kernel has proved itself, once a process; what it does not is warned of.

    Random states stay as they are. While a CUDA graph is captured nothing can be tried: a kernel
    that was not tried before is not trusted.

    Args:
        op: the stem of the operation's module, for which :mod:`metro.ops.kernels.trials` has one.
        device, dtype: of its inputs.
        width: of a head or a row.
        flags: names of the optional inputs it has, as in ``TRAINED`` of that module.
    """
    case = (op, device, dtype, width, flags)
    if case not in _faults:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        has_warned = any(fault and tried[:2] == case[:2] for tried, fault in _faults.items())
        fault = _faults[case] = find_fault(*case)
        if fault and not has_warned:
            logger.warning(
                "the kernel of %s is not used on %s for %s of width %d: %s; PyTorch's operation "
                "takes its place (METRO_TRITON=0 chooses it without a check)",
                op,
                device,
                str(dtype).removeprefix("torch."),
                width,
                fault,
            )
    return _faults[case] is None


def known_faults() -> list[str]:
    """What the kernels that this process has tried in vain did wrong."""
    return [
        f"{' '.join([op, str(dtype).removeprefix('torch.'), *flags])}: {fault}"
        for (op, _, dtype, _, flags), fault in _faults.items()
        if fault
    ]


def find_fault(
    op: str, device: torch.device, dtype: torch.dtype, width: int, flags: tuple[str, ...]
) -> str | None:
    """Say what is wrong with a kernel, ``None`` if nothing; see :func:`is_trusted`.

    Raises:
        torch.OutOfMemoryError: the little that it needs is not there.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices, device_type="cuda"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            # Not imported above: trials call the operations, which ask for trust.
            trials = importlib.import_module("metro.ops.kernels.trials")
            return fault_in(getattr(trials, op)(device, dtype, width, flags))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers, drivers and launchers raise what they like
        lines = str(error).strip().splitlines() or [""]
        return f"it cannot be built or launched: {type(error).__name__}: {lines[0]}"


def fault_in(trial: Trial) -> str | None:
    """Compare the kernel with its formula: finite, reproducible, and as exact.

    Of each tensor the largest error of a row (:func:`row_error`) may be twice the formula's own in
    that type, each against the formula in float64.
    """
    wide = {name: x.double() for name, x in trial.leaves.items()}
    truths, plains = both_passes(trial.formula, wide), both_passes(trial.formula, trial.leaves)
    found, again = (both_passes(trial.kernel, trial.leaves) for _ in range(2))
    for name, ours in found.items():
        if not ours.isfinite().all():
            return f"{name} is not finite"
        if not torch.equal(ours, again[name]):
            return f"{name} differs from run to run"
        error, plain = (row_error(x, truths[name]) for x in (ours, plains[name]))
        allowed = 2 * plain + max(SLACK, torch.finfo(ours.dtype).eps)
        if not error <= allowed:
            return f"{name} has an error of {error:.1e}, {allowed:.1e} is allowed"
    if trial.shares:
        observed, expected, count = trial.shares
        deviation = (expected * (1.0 - expected) / count).sqrt()
        farthest = float(((observed - expected) / deviation).abs().max())
        if not farthest <= 6.0:  # of 3,000 shares a fair one in 200,000 kernels
            return f"its draws have wrong shares, by {farthest:.0f} standard deviations"
    return None


def both_passes(run: Callable, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of the leaves, from the same seed and the same gradient."""
    own = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    seed(next(iter(own.values())).device)
    outs = run(**own)
    trained = [out for out in outs if out.requires_grad]
    upstream = [torch.linspace(-1.0, 1.0, x.numel()).sin().view(x.shape).to(x) for x in trained]
    grads = torch.autograd.grad(trained, list(own.values()), upstream)
    named = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return named | {f"gradient of {n}": g for n, g in zip(own, grads, strict=True)}


def row_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest relative error of a row; each number of a vector is one.

    Rows of less than `FLOOR` times the norm of the largest count as that large: zeros, and what is
    left where large terms cancel, have no relative error to speak of.
    """
    error, truth = (
        y.unsqueeze(-1) if y.dim() < 2 else y for y in (x.double() - truth, truth.double())
    )
    norms = truth.norm(dim=-1)
    return float((error.norm(dim=-1) / norms.clamp_min(FLOOR * norms.max())).max())


def seed(device: torch.device) -> None:
    """Set the generator of one device: ``torch.manual_seed`` sets those of all."""
    generator = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    generator.manual_seed(0)
