"""Several updates in a row against the original (``golden/train5_*`` and ``resume_*``).

The optimiser is the published one, written plainly: Adam, weight decay times learning rate taken
off the weight, linear warm-up and decay, clipping by the total norm.
"""

import json

import numpy as np
import pytest
import torch

from metro.pretraining.losses import token_cross_entropy
from tests.pretraining.golden import (
    CHECKPOINT,
    PUBLISHED_NAMES,
    load_checkpoint,
    load_model,
    metro_forward,
    parameter,
)

BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.01
RUNS = {
    # name: (letter, clip norm, label smoothing)
    "train5_a": ("a", 0.0, 0.0),
    "train5_b": ("b", 0.5, 0.0),
    "train5_r": ("r", 2.0, 0.0),
    "train5_c": ("c", 0.0, 0.0),
    "train5_s": ("s", 1.0, 0.1),
    "resume_a": ("a", 0.0, 0.0),
    "resume_c": ("c", 0.0, 0.0),
}


def adam_update(weights, gradients, state, step, lr):
    """Kingma & Ba (2015) with the bias corrections folded into the step size, as fairseq's Adam."""
    step_size = lr * (1 - BETAS[1] ** step) ** 0.5 / (1 - BETAS[0] ** step)
    for weight, gradient, (m, v) in zip(weights, gradients, state, strict=True):
        m.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        weight.add_(weight, alpha=-WEIGHT_DECAY * lr)
        weight.addcdiv_(m, v.sqrt() + EPSILON, value=-step_size)


def micro_batch(model, letter, batch, settings, smoothing):
    """Loss sum, sample size and the logged sums of one micro-batch."""
    batch = {name: torch.from_numpy(value).long() for name, value in batch.items()}
    if letter in "cs":
        is_target = batch["target"].ne(1)
        source = batch["src_tokens"]
        output = model(source, source.ne(1), batch["prev_output_tokens"], use_cache=False)
        words = torch.eye(output.logits.shape[-1])  # hidden states are logits
        losses = token_cross_entropy(
            output.logits[is_target], words, batch["target"][is_target], smoothing
        )
        loss = losses.loss.sum()
        return loss, int(is_target.sum()), {"loss": loss, "nll_loss": losses.nll.sum()}
    losses = metro_forward(model, batch, settings)
    logged = {name: getattr(losses, field) for name, field in PUBLISHED_NAMES.items()}
    del logged["unreplaced_n_correct"]  # counted on masked positions here
    return losses.total, int(losses.sample_size), logged


def test_updates_equal_the_original(golden):
    """Logged sums, gradient norm, and each parameter's sum and norm after each of 5 updates."""
    check_updates(golden, "train5_a")


def test_updates_of_the_whole_recording_equal_the_original(original):
    """As above, with the runs and float32 weights that ``tests/golden`` lacks."""
    recorded = [name for name in RUNS if (original / f"{name}.json").exists()]
    assert len(recorded) >= 4
    for name in recorded:
        check_updates(original, name)


def check_updates(golden, name: str) -> None:
    letter, clip_norm, smoothing = RUNS[name]
    resumed = name.startswith("resume")
    source = CHECKPOINT[letter] + ("_u150_full" if resumed else "")
    checkpoint = load_checkpoint(golden, source)
    model = load_model(golden, letter, checkpoint)
    settings = checkpoint["cfg"]["criterion"]
    arrays = np.load(golden / f"{name}.npz")
    updates = json.loads((golden / f"{name}.json").read_text())

    names = [n for n in updates[0]["param_sum_and_norm_after"] if parameter(model, n) is not None]
    weights = [parameter(model, n) for n in names]
    step, state = 0, [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    if resumed:
        saved = checkpoint["last_optimizer_state"]["state"]
        state = [(saved[i]["exp_avg"], saved[i]["exp_avg_sq"]) for i in range(len(weights))]
        step = 150
    for number, update in enumerate(updates):
        model.zero_grad()
        sample_size = 0
        for micro, recorded in enumerate(update["micro"]):
            prefix = f"u{number}_m{micro}_"
            batch = {
                n.removeprefix(prefix): arrays[n] for n in arrays.files if n.startswith(prefix)
            }
            loss, size, logged = micro_batch(model, letter, batch, settings, smoothing)
            loss.backward()
            sample_size += size
            for key, value in logged.items():
                want = recorded["logging_output"][key]
                assert float(value.detach()) == pytest.approx(want, rel=2e-5), (number, key)
        assert sample_size == update["sample_size_total"]
        gradients = [w.grad / sample_size for w in weights]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert float(norm) == pytest.approx(update["grad_norm_before_clip"], rel=1e-4)
        if 0 < clip_norm < norm:
            gradients = [g * (clip_norm / (norm + 1e-6)) for g in gradients]
        step += 1
        with torch.no_grad():
            adam_update(weights, gradients, state, step, update["lr_used"])
        for key, weight in zip(names, weights, strict=True):
            want_sum, want_norm = update["param_sum_and_norm_after"][key]
            assert float(weight.detach().double().norm()) == pytest.approx(
                want_norm, rel=1e-5, abs=1e-5
            )
            tolerance = 1e-5 * want_norm * weight.numel() ** 0.5 + 1e-5
            assert abs(float(weight.detach().double().sum()) - want_sum) <= tolerance, (number, key)
    for key in arrays.files:
        if key.startswith("final::") and not key.endswith("k_proj.bias"):
            weight = parameter(model, key.removeprefix("final::"))
            if weight is not None:
                np.testing.assert_allclose(weight.detach(), arrays[key], rtol=1e-4, atol=1e-5)
