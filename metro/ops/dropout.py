"""Dropout that keeps a byte per element for the backward pass on the CPU, where PyTorch keeps four.

Sixteen random bits decide an element, drawn from a NumPy generator seeded by PyTorch's: faster than
PyTorch's own draws on the CPU (``benchmarks/ops.py``), and as reproducible.
"""

import numpy as np
import torch
import torch.nn.functional as F

from metro.ops.dispatch import is_eager_cpu


def dropout(x: torch.Tensor, p: float, training: bool = True, impl: str = "auto") -> torch.Tensor:
    """``F.dropout(x, p, training)``: elements zeroed with probability ``p``, others over ``1 - p``.

    Args:
        x: any shape.
        p: probability of dropping, in steps of 2 ** -16 for ``bytes``.
        training: nothing is dropped otherwise.
        impl: ``reference`` (PyTorch's), ``bytes`` (CPU, described above) or ``auto``: ``bytes`` on
            the CPU.

    Raises:
        ValueError: an unknown ``impl``.
    """
    if not training or not p:
        return x
    if impl == "auto":
        impl = "bytes" if is_eager_cpu(x) else "reference"
    if impl == "reference":
        return F.dropout(x, p)
    if impl == "bytes":
        return ByteDropout.apply(x, p)
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference' or 'bytes'")


class ByteDropout(torch.autograd.Function):
    """Keeps which elements were kept, a byte each."""

    @staticmethod
    def forward(ctx, x, p):
        kept = draw_kept(x.shape, p, random_of(seed_from_torch()))
        ctx.save_for_backward(kept)
        ctx.scale = scale_of_kept(p)
        return kept.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(grad).mul_(ctx.scale), None


def seed_from_torch() -> int:
    """A seed drawn from PyTorch's generator, so that a seeded run draws the same again."""
    return int(torch.randint(2**62, ()))


def random_of(*seeds: int) -> np.random.Generator:
    """A generator of fast random bits; every tuple of seeds has a stream of its own."""
    return np.random.Generator(np.random.SFC64(seeds))


def drop_rate(p: float) -> float:
    """The probability with which :func:`draw_kept` drops: ``p`` in steps of 2 ** -16."""
    return round(p * 2**16) / 2**16


def scale_of_kept(p: float) -> float:
    """What the elements that :func:`draw_kept` keeps are multiplied by."""
    rate = drop_rate(p)
    return 1.0 / (1.0 - rate) if rate < 1 else 0.0


def draw_kept(shape: torch.Size, p: float, random: np.random.Generator) -> torch.Tensor:
    """uint8: 0 with probability ``drop_rate(p)`` and else 1."""
    count = shape.numel()
    words = random.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64)
    # Compared by NumPy and uint8, not bool: of PyTorch's operations these are several times faster.
    kept = words.view(np.uint16)[:count] >= round(p * 2**16)
    return torch.from_numpy(kept.view(np.uint8)).view(shape)
