"""Learning rates and Adam against fairseq's formulas, written plainly."""

import pytest
import torch

from metro.pretraining.optimization import build_optimizer, build_schedule, learning_rate
from metro.pretraining.settings import PretrainingSettings


def settings(**options) -> PretrainingSettings:
    return PretrainingSettings(data="data", output_dir="out", **options)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        # golden/train5_*: the rates of the first updates
        ({"warmup_updates": 2, "max_update": 8}, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"warmup_updates": 0, "max_update": 4, "power": 2.0}, [1, 9 / 16, 4 / 16, 1 / 16, 0]),
        ({"warmup_updates": 0, "max_update": 2, "end_learning_rate": 0.2}, [1, 0.6, 0.2, 0.2]),
        ({"warmup_updates": 4, "max_update": 2}, [0, 0.25, 0.5]),
        ({"warmup_updates": 4, "lr_scheduler": "inverse_sqrt"}, [0, 0.25, 0.5, 0.75, 1, 0.8**0.5]),
    ],
)
def test_the_schedule_gives_the_rates_of_fairseq(options, rates):
    """Oracle: `num_updates / warmup`, then the decay by definition; by hand."""
    chosen = settings(lr=1.0, **options)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], chosen)
    schedule = build_schedule(optimizer, chosen)
    for number, rate in enumerate(rates):
        assert learning_rate(chosen, number) == pytest.approx(rate, abs=1e-12)
        assert optimizer.param_groups[0]["lr"] == learning_rate(chosen, number)
        optimizer.step()
        schedule.step()


def test_adam_takes_the_steps_of_the_formula_and_its_state_can_be_loaded():
    """Oracle: the formula for one weight and two steps; the second by an optimizer that resumed."""
    chosen = settings(lr=0.1, adam_betas="(0.9, 0.98)", adam_eps=0.5, weight_decay=0.2)
    weight, m, v, expected = torch.nn.Parameter(torch.tensor([1.0])), 0.0, 0.0, 1.0
    state = None
    for step, gradient in enumerate((3.0, -1.0), start=1):
        optimizer = build_optimizer([weight], chosen)
        if state is not None:
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.1
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        state = optimizer.state_dict()
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        rate = 0.1 * (1 - 0.98**step) ** 0.5 / (1 - 0.9**step)
        expected = expected - 0.1 * 0.2 * expected - rate * m / (v**0.5 + 0.5)
        assert float(weight.detach()) == pytest.approx(expected, rel=1e-6)
