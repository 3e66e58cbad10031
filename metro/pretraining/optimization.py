"""Optimizer and learning rate as fairseq has them."""

import torch

from metro.ops.adamw import adamw_step
from metro.pretraining.settings import PretrainingSettings
from metro.sharding import local


class Adam(torch.optim.Optimizer):
    """fairseq's Adam: epsilon is added to the root of the second moment before its bias correction.

    The formula is that of :func:`metro.ops.adamw.adamw_step`. Weight decay is of all parameters.
    """

    def __init__(self, params, *, betas: tuple[float, ...], eps: float, weight_decay: float):
        super().__init__(params, dict(lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; parameters without gradient stay."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self.state[p] = {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
                self.state[p]["step"] += 1
            states = [self.state[p] for p in params]
            [step] = {int(state["step"]) for state in states} or {0}
            adamw_step(
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                step,
                lr=group["lr"],
                betas=tuple(group["betas"]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss


def build_optimizer(params, settings: PretrainingSettings) -> Adam:
    """Make the optimizer of these settings; its rate is set by a schedule."""
    betas, decay = settings.betas, settings.weight_decay
    return Adam(params, betas=betas, eps=settings.adam_eps, weight_decay=decay)


def learning_rate(settings: PretrainingSettings, num_updates: int) -> float:
    """Return the rate of the update that follows ``num_updates``.

    As in fairseq the first update of a warm-up has rate 0.
    """
    peak, warmup = settings.lr, settings.warmup_updates
    end, total = settings.end_learning_rate, settings.total_num_update or settings.max_update
    if warmup > 0 and num_updates <= warmup:
        return num_updates / float(warmup) * peak
    if settings.lr_scheduler == "inverse_sqrt":
        return peak * (max(warmup, 1) / max(num_updates, 1)) ** 0.5
    if num_updates >= total:
        return end
    left = 1 - (num_updates - warmup) / (total - warmup)
    return (peak - end) * left**settings.power + end


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: PretrainingSettings
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a schedule whose rates are those of :func:`learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1.0
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda num_updates: learning_rate(settings, num_updates)
    )
