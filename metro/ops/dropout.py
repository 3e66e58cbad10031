"""Dropout that keeps a bit per element for the backward pass on the CPU, where PyTorch keeps 32.

Sixteen random bits decide an element, drawn from a NumPy generator seeded by PyTorch's: faster than
PyTorch's own draws on the CPU (``benchmarks/ops.py``), and as reproducible.
"""

import numpy as np
import torch
import torch.nn.functional as F

from metro.ops.dispatch import is_eager_cpu

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Of as many bytes as a number has."""


def dropout(x: torch.Tensor, p: float, training: bool = True, impl: str = "auto") -> torch.Tensor:
    """``F.dropout(x, p, training)``: elements zeroed with probability ``p``, others over ``1 - p``.

    Args:
        x: any shape.
        p: probability of dropping, in steps of 2 ** -16 for ``bits``.
        training: nothing is dropped otherwise.
        impl: ``reference`` (PyTorch's), ``bits`` (CPU, described above) or ``auto``: ``bits`` on
            the CPU.

    Raises:
        ValueError: an unknown ``impl``.
    """
    if not training or not p:
        return x
    if impl == "auto":
        impl = "bits" if is_eager_cpu(x) else "reference"
    if impl == "reference":
        return F.dropout(x, p)
    if impl == "bits":
        bits = pack(draw_kept(x.shape, p, random_of(seed_from_torch())))
        return BitDropout.apply(x, bits, scale_of_kept(p))
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference' or 'bits'")


class BitDropout(torch.autograd.Function):
    """Keeps which elements were kept, a bit each."""

    @staticmethod
    def forward(ctx, x, bits, scale):
        ctx.save_for_backward(bits)
        ctx.scale = scale
        masks = bit_masks(unpack(bits, x.shape), x.dtype)
        return drop(x, masks, out=masks.view(x.dtype)).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        return BitDropout.apply(grad, *ctx.saved_tensors, ctx.scale), None, None


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
    words = random.bit_generator.random_raw((count + 3) // 4)
    # Compared by NumPy and uint8, not bool: of PyTorch's operations these are several times faster.
    kept = words.view(np.uint16)[:count] >= round(p * 2**16)
    return torch.from_numpy(kept.view(np.uint8)).view(shape)


def bit_masks(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of each uint8 0 or 1 an integer with no bit or all bits set, as wide as a ``dtype``."""
    return kept.view(torch.int8).neg().to(INTEGERS[dtype.itemsize])


def drop(x: torch.Tensor, masks: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``x * kept`` by :func:`bit_masks` of ``kept``: several times as fast on the CPU.

    ``out`` is memory for the result, ``x`` itself for one.
    """
    torch.bitwise_and(x.view(masks.dtype), masks, out=out.view(masks.dtype))
    return out


def pack(kept: torch.Tensor) -> torch.Tensor:
    """The uint8 of :func:`draw_kept` in bits, flat."""
    return torch.from_numpy(np.packbits(kept.numpy()))


def unpack(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What :func:`pack` was given."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).view(shape)
