"""Does the fused model train as the plain one? Losses of the same METRO model, computed both ways.

One step on the CPU in float32 without dropout: the losses of ``metro`` and ``plain`` of
`pretraining.py` must agree to 1e-5, with padding too.

Then METRO is trained for 20 steps three times from the same weights, on the same corrupted text and
without dropout: fused, not fused, and (on a GPU) not fused in float32. The first two curves may
differ by twice what the second differs from the third, which is what bf16 does to the plain model;
on the CPU, all in float32, by 1e-4. There the small model is taken.
"""

import argparse
import os

import torch

from benchmarks.common import measure_isolated, write_results
from benchmarks.pretraining import (
    SENTINEL,
    Optimizer,
    build_metro,
    build_step,
    metro_batch,
    on_device,
)
from metro.fusion import fuse
from metro.pretraining.losses import MetroObjective

CURVE_STEPS = 20


def with_samples(batch: dict) -> dict:
    """The same with given tokens in the place of the auxiliary model's samples."""
    generator = torch.Generator().manual_seed(2)
    samples = torch.randint(4, SENTINEL, batch["is_masked"].shape, generator=generator)
    return batch | {"corrupted_ids": batch["masked_ids"].where(~batch["is_masked"], samples)}


def losses_without_dropout(way: str, size: str) -> list[float]:
    """Losses of enlarged fresh weights on a sample, and on two of which one is padded."""
    model, loss_of = build_step(way, size, dropout=0.0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or name.startswith("rtd_head"):
            parameter.data.normal_(generator=generator)  # fresh ones are zero
    batches = [metro_batch(1, padded=False), metro_batch(2, padded=True)]
    return [float(loss_of(with_samples(batch)).detach()) for batch in batches]


def loss_curve(fused: bool, size: str, batch_size: int, device: str, dtype: str) -> dict:
    """Loss per token of 20 steps on given samples without dropout, and the state's keys."""
    os.environ["METRO_TRITON"] = "1"
    model, batch = build_metro(size, dropout=0.0).train(), metro_batch(batch_size, padded=False)
    inputs = on_device(with_samples(batch), device)
    model = (fuse(model) if fused else model).to(device, getattr(torch, dtype))
    optimizer, losses = Optimizer(model, lr=4e-4), []
    for _ in range(CURVE_STEPS):
        result = model(**inputs, objective=MetroObjective(weighted_lm=True))
        (result.total / result.sample_size).backward()
        optimizer.step()
        losses.append((result.total / result.sample_size).detach())
    return {"losses": torch.stack(losses).tolist(), "keys": list(model.state_dict())}


def compare_curves(size: str, batch_size: int, device: str) -> dict:
    """The curves, how far they are apart and may be, and whether the state dict's keys agree."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    runs = {"fused": (True, dtype), "plain": (False, dtype), "plain float32": (False, "float32")}
    if device != "cuda":
        del runs["plain float32"]
    found = {
        name: measure_isolated(loss_curve, fused, size, batch_size, device, its_dtype).value
        for name, (fused, its_dtype) in runs.items()
    }
    same_keys = found["fused"]["keys"] == found["plain"]["keys"]
    curves = {name: curve["losses"] for name, curve in found.items()}

    def apart(a: str, b: str) -> float:
        return max(abs(x / y - 1) for x, y in zip(curves[a], curves[b], strict=True))

    allowed = 2 * apart("plain", "plain float32") if device == "cuda" else 1e-4
    difference = apart("fused", "plain")
    for name, curve in curves.items():
        print(f"{name:14}", *(f"{loss:.4f}" for loss in curve))
    print(f"fused and plain curve differ by {difference:.1e}, {allowed:.1e} may be")
    return {
        "losses": curves,
        "relative_difference": difference,
        "allowed": allowed,
        "same_keys": same_keys,
    }


def failures_of(loss_difference: float, curves: dict) -> list[str]:
    """Name the claims about the fused model that do not hold."""
    failures = []
    if not loss_difference <= 1e-5:
        failures.append("the losses of metro and plain must agree to 1e-5")
    if not curves["same_keys"]:
        failures.append("fuse() changes the keys of the state dict")
    if not curves["relative_difference"] <= curves["allowed"]:
        failures.append("the curves of the fused and the plain model are too far apart")
    return failures


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--size", choices=["base", "small"], default="base")
    args = parser.parse_args()
    pairs = [
        measure_isolated(losses_without_dropout, way, args.size).value for way in ("metro", "plain")
    ]
    difference = max(abs(ours / plain - 1) for ours, plain in zip(*pairs, strict=True))
    print(f"relative difference of the losses of metro and plain: {difference:.1e}")
    on_cpu = args.device == "cpu"
    given = ("small", 4) if on_cpu else (args.size, 32)
    curves = compare_curves(*given, args.device)
    failures = failures_of(difference, curves)
    subject = "pretraining_curves" if on_cpu else "pretraining_curves_gpu"
    write_results(subject, [], loss_difference=difference, failures=failures, **curves)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
