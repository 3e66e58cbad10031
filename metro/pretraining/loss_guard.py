"""Stops a run whose loss turns NaN or infinite, naming the update and the examples."""

from __future__ import annotations

import torch


class LossGuard:
    """Remembers for each micro-batch of the current update if its loss is finite.

    Nothing is read back from the GPU before `check`, which is called where the run synchronises
    with it anyway.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def clear(self) -> None:
        self._pending = []

    def watch(self, loss: torch.Tensor, sample_ids: torch.Tensor) -> None:
        self._pending.append((torch.isfinite(loss.detach()).all(), sample_ids))

    def check(self, num_updates: int) -> None:
        """Raise FloatingPointError where a loss since `clear` is not finite."""
        pending, self._pending = self._pending, []
        if not pending or bool(torch.stack([is_finite for is_finite, _ in pending]).all()):
            return
        bad = [_describe(ids) for is_finite, ids in pending if not bool(is_finite)]
        raise FloatingPointError(
            f"the loss of update {num_updates + 1} is NaN or infinite in the batch with sample ids "
            f"{'; '.join(dict.fromkeys(bad))}. Lower lr, raise "
            "warmup_updates or set clip_norm, and resume from the last "
            "checkpoint"
        )

    def explain(self, error: FloatingPointError, num_updates: int) -> FloatingPointError:
        """Word fairseq's own complaint about NaN gradients."""
        pending = self._pending
        try:
            self.check(num_updates)
        except FloatingPointError as found:
            return found
        ids = "; ".join(dict.fromkeys(_describe(ids) for _, ids in pending)) or "unknown"
        return FloatingPointError(
            f"update {num_updates + 1} failed ({error}) although the losses of this process are "
            f"finite; its batches have sample ids {ids}. With several processes see the others' "
            "messages; else lower lr or set clip_norm"
        )


def _describe(sample_ids: torch.Tensor) -> str:
    return str(sample_ids.tolist())
