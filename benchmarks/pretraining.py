"""Speed and memory of METRO-base pretraining beside the plain way and beside T5.

Three ways to train on 512-token samples with the same optimiser, each in a process of its own:

* ``metro``: :class:`metro.pretraining.model.MetroPretrainingModel` as the plugins train it.
* ``plain``: the same weights computed as the original does, see `plain_pretraining.py`.
* ``t5``: Hugging Face T5-v1.1-base, span corruption of as many source tokens.

Lower bound: the FLOPs of :func:`metro_flops_per_token` (1.5 GFLOP for METRO-base, forward and
backward, only what masked positions need in last layers and projections) over the matrix rate of
the same run; "of matrix peak" is that share. On a GPU models are bf16, as with fairseq's
``--bf16``: the optimiser has float32 copies of the weights and float32 moments.

Prints a table and writes ``benchmarks/results/pretraining.json``. Losses of ``metro`` and ``plain``
must agree to 1e-5 in float32 without dropout; speed is measured with the published dropout.

Then METRO is trained for 20 steps three times from the same weights, on the same corrupted text and
without dropout: fused, not fused, and (on a GPU) not fused in float32. The first two curves may
differ by twice what the second differs from the third, which is what bf16 does to the plain model;
on the CPU, all in float32, by 1e-4. There the small model is taken.
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.common import measure_isolated, print_table, write_results
from benchmarks.plain_pretraining import make_plain, plain_loss
from metro.fusion import fuse
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel

VOCAB_SIZE, SENTINEL, LENGTH = 32768 + 512, 32768, 512
WAYS = ("metro", "plain", "t5")
CURVE_STEPS = 20
TARGETS = {
    "tokens/s": (">=", 250_000),
    "of matrix peak": (">=", 0.5),
    "x plain": (">=", 3),
    "of plain": ("<=", 0.4),
}
"""Of METRO-base on one H200 in bf16; "of plain" is of its peak memory."""


def metro_flops_per_token(config: MetroT5Config, auxiliary_layers: int) -> float:
    """Multiplications and additions of one training step per token: three times the forward pass.

    A layer multiplies with 4 D^2 (self-attention), 4 D^2 more (cross-attention, decoder) and 2 D F
    weights, and attention takes 4 T D per token (half where causal). Last layers of auxiliary model
    and decoder need outputs at masked positions only, but keys and values of all.
    """
    d, f, masked = config.d_model, config.d_ff, 0.15
    attention = 4 * LENGTH * d
    encoder = 2 * (4 * d * d + 2 * d * f) + attention
    decoder = 2 * (8 * d * d + 2 * d * f) + attention * 1.5
    keys_and_values = 2 * 2 * d * d
    last_auxiliary = keys_and_values + masked * (encoder - keys_and_values)
    last_decoder = 2 * keys_and_values + masked * (decoder - 2 * keys_and_values)
    forward = (
        encoder * (config.num_layers + auxiliary_layers - 1)
        + decoder * (config.num_decoder_layers - 1)
        + last_auxiliary
        + last_decoder
        + 2 * masked * 2 * config.vocab_size * d
    )
    return 3 * forward


def matrix_peak(device: str) -> float:
    """FLOP/s of the best of five matrix products: bf16 on a GPU, float32 on the CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def build_metro(size: str, dropout: float) -> MetroPretrainingModel:
    """METRO-base as published, or a small one to try the script."""
    sizes = {
        "base": {},
        "small": dict(d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4),
    }[size]
    torch.manual_seed(0)
    config = MetroT5Config(vocab_size=VOCAB_SIZE, dropout_rate=dropout, **sizes)
    return MetroPretrainingModel(config, MetroPretrainingConfig(4 if size == "base" else 1))


def metro_batch(batch_size: int) -> dict[str, torch.Tensor]:
    """Random tokens, 15 % masked."""
    generator = torch.Generator().manual_seed(1)
    original = torch.randint(4, SENTINEL, (batch_size, LENGTH), generator=generator)
    is_masked = torch.rand(original.shape, generator=generator) < 0.15
    return {
        "masked_ids": original.masked_fill(is_masked, SENTINEL),
        "original_ids": original,
        "is_masked": is_masked,
        "decoder_input_ids": F.pad(original[:, :-1], (1, 0), value=SENTINEL),
        "sampling_seed": torch.arange(batch_size),
    }


def build_step(way: str, size: str, batch_size: int, dropout: float):
    """A model in training mode, and a function from a batch to its loss."""
    objective = MetroObjective(weighted_lm=True)
    if way == "t5":
        model, batch = build_t5(size, dropout), t5_batch(batch_size)
        return model.train(), batch, lambda inputs: model(**inputs, use_cache=False).loss
    model, batch = build_metro(size, dropout).train(), metro_batch(batch_size)
    if way == "metro":
        fuse(model)
        return model, batch, lambda inputs: model(**inputs, objective=objective).total
    make_plain(model)
    return model, batch, lambda inputs: plain_loss(model, inputs, objective)


def build_t5(size: str, dropout: float):
    """T5-v1.1 of transformers, as wide and deep as METRO's main model."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "base": dict(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12),
        "small": dict(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    }[size]
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=dropout,
            decoder_start_token_id=0,
            **sizes,
        )
    )


def t5_batch(batch_size: int) -> dict[str, torch.Tensor]:
    """512 corrupted source tokens and the 114 target tokens that go with them (Raffel et al.)."""
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(4, 32000, (batch_size, LENGTH), generator=generator),
        "labels": torch.randint(4, 32000, (batch_size, 114), generator=generator),
    }


class Optimizer:
    """AdamW by PyTorch's fused kernel; half precision is trained by way of float32 copies."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-4):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.in_half = self.params[0].dtype != torch.float32
        self.masters = [p.detach().float() for p in self.params] if self.in_half else self.params
        self.adamw = torch.optim.AdamW(
            self.masters, lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights and forget the gradients."""
        if self.in_half:
            used = [
                (m, p) for m, p in zip(self.masters, self.params, strict=True) if p.grad is not None
            ]
            for master, _ in used:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([m.grad for m, _ in used], [p.grad for _, p in used])
            for param in self.params:
                param.grad = None
        self.adamw.step()
        self.adamw.zero_grad()
        if self.in_half:
            torch._foreach_copy_(self.params, self.masters)


def on_device(model, batch: dict, device: str, dtype: torch.dtype):
    """Both, and what is known on the host when a batch is made."""
    known = {}
    if "is_masked" in batch:
        known = {"max_masked": int(batch["is_masked"].sum(1).max()), "has_padding": False}
    batch = {name: value.to(device) for name, value in batch.items()}
    return model.to(device, dtype), {**batch, **known}


def time_steps(way: str, size: str, batch_size: int, num_steps: int, device: str) -> dict:
    """Seconds of each training step (forward, backward, AdamW) once warm, and GPU memory."""
    model, batch, loss_of = build_step(way, size, batch_size, dropout=0.1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, inputs = on_device(model, batch, device, dtype)
    optimizer, seconds = Optimizer(model), []
    for _ in range(num_steps + (3 if device == "cuda" else 1)):
        synchronize(device)
        start = time.perf_counter()
        loss_of(inputs).backward()
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": seconds[-num_steps:], "gpu_bytes": peak}


def loss_curve(fused: bool, size: str, batch_size: int, device: str, dtype: str) -> dict:
    """Loss per token of 20 steps on given samples without dropout, and the state's keys."""
    model, batch = build_metro(size, dropout=0.0).train(), metro_batch(batch_size)
    generator = torch.Generator().manual_seed(2)
    samples = torch.randint(4, SENTINEL, batch["is_masked"].shape, generator=generator)
    batch["corrupted_ids"] = batch["masked_ids"].where(~batch["is_masked"], samples)
    model = fuse(model) if fused else model
    model, inputs = on_device(model, batch, device, getattr(torch, dtype))
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


def loss_without_dropout(way: str, size: str, batch_size: int) -> float:
    """The loss of enlarged fresh weights on a batch with given samples."""
    model, batch, loss_of = build_step(way, size, batch_size, dropout=0.0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or name.startswith("rtd_head"):
            parameter.data.normal_(generator=generator)  # fresh ones are zero
    samples = torch.randint(4, SENTINEL, batch["is_masked"].shape, generator=generator)
    batch["corrupted_ids"] = batch["masked_ids"].where(~batch["is_masked"], samples)
    return float(loss_of(batch).detach())


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--size", choices=["base", "small"], default="base")
    parser.add_argument("--batch-size", type=int, help="samples of 512 tokens a step (6, GPU: 32)")
    parser.add_argument("--steps", type=int, help="timed steps in a round (1, GPU: 10)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds over the three ways, in turn")
    args = parser.parse_args()
    batch_size = args.batch_size or (32 if args.device == "cuda" else 6)
    num_steps = args.steps or (10 if args.device == "cuda" else 1)

    peak_flops = measure_isolated(matrix_peak, args.device).value
    seconds, peaks = {way: [] for way in WAYS}, dict.fromkeys(WAYS, 0)
    for _ in range(args.rounds):
        for way in WAYS:
            run = measure_isolated(time_steps, way, args.size, batch_size, num_steps, args.device)
            seconds[way] += run.value["seconds"]
            peaks[way] = max(peaks[way], run.value["gpu_bytes"] or run.peak_bytes)
            print(f"{way}: {run.value['seconds']} s, {peaks[way] / 2**30:.2f} GiB", flush=True)
    losses = {
        way: measure_isolated(loss_without_dropout, way, args.size, 1).value
        for way in ("metro", "plain")
    }
    model = build_metro("small", 0.0) if args.size == "small" else None
    config = model.config if model else MetroT5Config(vocab_size=VOCAB_SIZE)
    flops = metro_flops_per_token(config, 1 if model else 4)
    speed = {w: batch_size * LENGTH / statistics.median(s) for w, s in seconds.items()}
    rows = [
        {
            "way": way,
            "tokens/s": speed[way],
            "x plain": speed[way] / speed["plain"],
            "of matrix peak": None if way == "t5" else speed[way] * flops / peak_flops,
            "peak GiB": peaks[way] / 2**30,
            "of plain": peaks[way] / peaks["plain"],
            "loss": losses.get(way),
        }
        for way in WAYS
    ]
    title = f"METRO-{args.size} pretraining on {args.device}, {batch_size} x {LENGTH} tokens a step"
    print_table(rows, title)
    difference = abs(losses["metro"] / losses["plain"] - 1)
    print(f"relative difference of the losses of metro and plain: {difference:.1e}")
    if args.device == "cuda" and args.size == "base":
        for name, (sign, target) in TARGETS.items():
            value = rows[0][name]
            met = value >= target if sign == ">=" else value <= target
            print(f"{name}: {value:.3g}, target {sign} {target:,}: {'met' if met else 'NOT met'}")
    on_cpu = args.device == "cpu"
    store = partial(
        write_results,
        "pretraining" if on_cpu else "pretraining_gpu",
        rows,
        size=args.size,
        batch_size=batch_size,
        matrix_peak_tflops=peak_flops / 1e12,
        flops_per_token=flops,
        loss_difference=difference,
        seconds=seconds,
    )
    store(curves=None)  # the curves take their time
    curves = compare_curves(
        "small" if on_cpu else args.size, 4 if on_cpu else batch_size, args.device
    )
    store(curves=curves)
    if failures := failures_of(difference, curves):
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
