"""Does the fused model train as the plain one? Losses of the same METRO model, computed both ways.

METRO is trained for 20 steps three times from the same weights, on the same corrupted text and
without dropout: fused, not fused, and (on a GPU) not fused in float32. The first two curves may
differ by twice what the second differs from the third, which is what bf16 does to the plain model;
on the CPU, all in float32, by 1e-4. There the small model is taken. Results are written after each.

Then one step on the CPU in float32 without dropout (where the curves are of a GPU, of the small
model): the losses of ``metro`` and ``plain`` of `pretraining.py`, with padding too, must agree to
1e-5; so must those of ``t5 spans`` and ``t5 plain``, which run on the CPU alone.
"""

import argparse
from collections.abc import Iterator

import torch

from benchmarks.common import measure_isolated, write_results
from benchmarks.pretraining import (
    SENTINEL,
    Optimizer,
    build_metro,
    build_step,
    metro_batch,
    on_device,
    subject_of,
    t5_batch,
)
from benchmarks.timing import take_proven_kernels
from metro.fusion import fuse
from metro.ops.kernels.self_check import known_faults
from metro.pretraining.losses import MetroObjective

CURVE_STEPS = 20


def with_samples(batch: dict) -> dict:
    """The same with given tokens in the place of the auxiliary model's samples."""
    generator = torch.Generator().manual_seed(2)
    samples = torch.randint(4, SENTINEL, batch["is_masked"].shape, generator=generator)
    return batch | {"corrupted_ids": batch["masked_ids"].where(~batch["is_masked"], samples)}


def losses_without_dropout(way: str, size: str) -> list[float]:
    """Losses of enlarged fresh weights on a sample, and on two of which one is padded.

    Of span corruption on two samples.
    """
    model, loss_of = build_step(way, size, dropout=0.0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or name.startswith("rtd_head"):
            parameter.data.normal_(generator=generator)  # fresh ones are zero
    if way.startswith("t5"):
        return [float(loss_of(t5_batch(2, way)).detach())]
    batches = [metro_batch(1, padded=False), metro_batch(2, padded=True)]
    return [float(loss_of(with_samples(batch)).detach()) for batch in batches]


def loss_curve(fused: bool, size: str, batch_size: int, device: str, dtype: str) -> dict:
    """Loss per token of 20 steps on given samples without dropout, and the state's keys."""
    take_proven_kernels()
    model, batch = build_metro(size, dropout=0.0).train(), metro_batch(batch_size, padded=False)
    inputs = on_device(with_samples(batch), device)
    model = (fuse(model) if fused else model).to(device, getattr(torch, dtype))
    optimizer, losses = Optimizer(model, lr=4e-4), []
    for _ in range(CURVE_STEPS):
        result = model(**inputs, objective=MetroObjective(weighted_lm=True))
        (result.total / result.sample_size).backward()
        optimizer.step()
        losses.append((result.total / result.sample_size).detach())
    keys, faults = list(model.state_dict()), known_faults()
    return {"losses": torch.stack(losses).tolist(), "keys": keys, "faults": faults}


def compare_curves(size: str, batch_size: int, device: str) -> Iterator[dict]:
    """The curves, how far they are apart and may be, and whether the state dict's keys agree.

    After each run all that is known by then.
    """
    dtype = "bfloat16" if device == "cuda" else "float32"
    runs = {"fused": (True, dtype), "plain": (False, dtype), "plain float32": (False, "float32")}
    if device != "cuda":
        del runs["plain float32"]
    found, facts = {}, {}
    for name, (fused, its_dtype) in runs.items():
        given = (fused, size, batch_size, device, its_dtype)
        found[name] = measure_isolated(loss_curve, *given).value
        curves = {each: curve["losses"] for each, curve in found.items()}
        print(f"{name:14}", *(f"{loss:.4f}" for loss in curves[name]), flush=True)
        facts |= {"losses": curves, "faults": found["fused"]["faults"]}
        if name == "plain":
            facts["same_keys"] = found["fused"]["keys"] == found["plain"]["keys"]
            facts["relative_difference"] = apart(curves["fused"], curves["plain"])
            if device != "cuda":
                facts["allowed"] = 1e-4
        if name == "plain float32":
            facts["allowed"] = 2 * apart(curves["plain"], curves["plain float32"])
        yield facts
    print(f"fused and plain curve differ by {facts['relative_difference']:.1e}, "
          f"{facts['allowed']:.1e} may be")  # fmt: skip


def apart(curve: list[float], other: list[float]) -> float:
    """The largest relative difference of two curves; NaN where one of them has it."""
    ours, theirs = (torch.tensor(losses, dtype=torch.float64) for losses in (curve, other))
    return float((ours / theirs - 1).abs().max())


def failures_of(facts: dict) -> list[str]:
    """Name the claims about the fused model that do not hold, of those that were looked at."""
    failures = []
    for what, difference in facts.get("loss_differences", {}).items():
        if not difference <= 1e-5:
            failures.append(f"{what}: losses of METRO and the plain way must agree to 1e-5")
    if not facts.get("same_keys", True):
        failures.append("fuse() changes the keys of the state dict")
    if "allowed" in facts and not facts["relative_difference"] <= facts["allowed"]:
        failures.append("the curves of the fused and the plain model are too far apart")
    return failures


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--size", choices=["base", "small"], default="base")
    args = parser.parse_args()
    on_cpu, facts = args.device == "cpu", {}

    def store() -> None:
        subject = subject_of("pretraining_curves", args.size) + "_gpu" * (not on_cpu)
        write_results(subject, [], failures=failures_of(facts), **facts)

    given = ("small", 4) if on_cpu else (args.size, 8)
    facts |= dict(zip(("size", "batch_size"), given, strict=True))
    for known in compare_curves(*given, args.device):
        facts |= known
        store()
    size = args.size if on_cpu else "small"
    pairs = {f"METRO-{size}": ("metro", "plain")}
    if on_cpu:
        pairs[f"T5-{size} spans"] = ("t5 spans", "t5 plain")
    for what, ways in pairs.items():
        losses = [measure_isolated(losses_without_dropout, way, size).value for way in ways]
        facts.setdefault("loss_differences", {})[what] = apart(*losses)
        print(f"{what}: losses of {' and '.join(ways)} apart by {apart(*losses):.1e}")
        store()
    if failures := failures_of(facts):
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
