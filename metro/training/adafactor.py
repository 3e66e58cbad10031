"""Adafactor (Shazeer & Stern, 2018) of sharded weights, by the formula of transformers' own.

Each process updates its rows of a weight; sums over rows are taken over all processes. State and
its names are those of transformers' class, so that a checkpoint serves both.

Shapes: R rows and C columns of a weight (the last two dimensions of one that has more).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Adafactor

from metro.sharding import local


class ShardedAdafactor(Adafactor):
    """Of a fixed rate, as `metro finetune` has it, without a first moment."""

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; parameters without gradient stay."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            assert group["beta1"] is None and not group["relative_step"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= initial_state(p)
                state["step"] += 1
                update = scaled_update(p, state, group)
                local(p).mul_(1 - group["weight_decay"] * group["lr"]).sub_(update)
        return loss


def initial_state(p: DTensor) -> dict:
    """Make the state before the first step; means over columns are sharded as the weight is."""
    state = {"step": 0, "RMS": local(p).new_zeros(())}
    if p.ndim < 2:
        return state | {"exp_avg_sq": torch.zeros_like(p)}
    mean_R = torch.zeros_like(p.detach().select(-1, 0))
    whole = p.ndim == 2  # all rows of a column are needed for its mean, which all processes have
    zeros_C = torch.zeros_like(p.detach().select(-2, 0))
    mean_C = local(p).new_zeros(p.shape[-1]) if whole else zeros_C
    return state | {"exp_avg_sq_row": mean_R, "exp_avg_sq_col": mean_C}


def scaled_update(p: DTensor, state: dict, group: dict) -> torch.Tensor:
    """Compute what is subtracted from this process's rows, and advance their state."""
    grad_RC = local(p.grad)
    square_RC = grad_RC.square() + group["eps"][0]
    weight = state["step"] ** group["decay_rate"]  # of this step in the running means
    if p.ndim < 2:
        mean_RC = local(state["exp_avg_sq"]).lerp_(square_RC, weight)
        update_RC = mean_RC.rsqrt() * grad_RC
    else:
        mean_R, mean_C = local(state["exp_avg_sq_row"]), local(state["exp_avg_sq_col"])
        mean_R.lerp_(square_RC.mean(-1), weight)
        if p.ndim == 2:
            sums = torch.cat([square_RC.sum(0), mean_R.sum(0, keepdim=True)])
            of_columns, of_rows = (add_up(sums, p) / p.shape[0]).split([p.shape[1], 1])
            mean_C.lerp_(of_columns, weight)
        else:
            mean_C.lerp_(square_RC.mean(-2), weight)
            of_rows = mean_R.mean(-1, keepdim=True)
        scale_R, scale_C = (mean_R / of_rows).rsqrt(), mean_C.rsqrt()
        update_RC = scale_R.unsqueeze(-1) * scale_C.unsqueeze(-2) * grad_RC
    rms = (add_up(update_RC.square().sum(), p) / p.numel()).sqrt()
    return update_RC * (group["lr"] / (rms / group["clip_threshold"]).clamp(min=1))


def add_up(value: torch.Tensor, p: DTensor) -> torch.Tensor:
    """Sum over the processes that have rows of a weight."""
    dist.all_reduce(value, group=p.device_mesh.get_group(p.device_mesh.ndim - 1))
    return value
