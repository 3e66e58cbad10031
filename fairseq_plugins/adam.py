"""fairseq's Adam in one pass over memory, for its optimizer `adam` on GPUs.

fairseq has two fused ones, both of NVIDIA's apex; without apex it computes tensor by tensor. The
formula, and what is written into checkpoints, are those of fairseq's own, which `--use-old-adam`
still chooses. Importing this module puts it in place.
"""

import torch
from fairseq.optim import adam

from fairseq_plugins.replaced import replaces
from metro.ops.adamw import adamw_step


class FusedAdam(adam.Adam):
    """Float32 parameters on one GPU take one step together; others go fairseq's way."""

    fused_devices = ("cuda",)

    def __init__(self, params, use_fp16_stats: bool = False, **settings):
        if use_fp16_stats:
            raise NotImplementedError("fp16_adam_stats needs NVIDIA's apex; set it to false")
        super().__init__(params, **settings)

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in params]
        steps = {state.get("step", 0) for state in states}
        fits = all(
            is_plain(x) and x.device.type in self.fused_devices for p in params for x in (p, p.grad)
        )
        together = len(self.param_groups) == len(steps) == len({p.device for p in params}) == 1
        if not (fits and together):
            return super().step(closure)
        loss = None if closure is None else closure()
        group, step = self.param_groups[0], steps.pop() + 1
        for param, state in zip(params, states, strict=True):
            state["step"] = step
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state.get(name)
                state[name] = param.data.new_zeros(param.shape) if moment is None else moment
        adamw_step(
            [p.data for p in params],
            [p.grad.data for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            step,
            lr=group["lr"],
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        return loss


def is_plain(x: torch.Tensor) -> bool:
    """Return whether PyTorch's fused kernel reads a tensor as it is stored."""
    return x.dtype == torch.float32 and x.is_contiguous()


@replaces(adam, "get_fused_adam_class")
def get_fused_adam_class(original):
    """Give fairseq's `adam` this class where apex is missing."""
    return original() or FusedAdam
