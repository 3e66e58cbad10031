"""Draws that are functions of seed and counter: no batch, device or order changes them."""

import torch


def counter_bits(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Compute 64 random bits per (seed, counter): SplitMix64 (Steele et al., 2014) applied twice.

    Args:
        seeds, counters: int64 tensors that broadcast together.
    """

    def mix(x):
        x = (x ^ shift(x, 30)) * -4658895280553007687
        x = (x ^ shift(x, 27)) * -7723592293110705685
        return x ^ shift(x, 31)

    return mix(mix(seeds) + (counters + 1) * -7046029254386353131)


def shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Compute ``x >> bits`` of an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform_of(bits: torch.Tensor) -> torch.Tensor:
    """Convert the highest 24 of 64 random bits to a float32 in [0, 1)."""
    return shift(bits, 40).float() * 2.0**-24


@torch.no_grad()
def sample_tokens(logits_BMV: torch.Tensor, uniforms_BM: torch.Tensor) -> torch.Tensor:
    """Draw once from ``softmax(logits)`` for each row, by inverting the distribution in float32.

    Args:
        logits_BMV: unnormalised log-probabilities.
        uniforms_BM: one uniform number in [0, 1) for each.

    Returns:
        int64 token ids B,M.
    """
    cumulative_BMV = logits_BMV.softmax(-1, dtype=torch.float32).cumsum_(-1)
    thresholds_BM1 = uniforms_BM.unsqueeze(-1) * cumulative_BMV[..., -1:]
    drawn = torch.searchsorted(cumulative_BMV, thresholds_BM1, right=True).squeeze(-1)
    return drawn.clamp(max=logits_BMV.shape[-1] - 1)
