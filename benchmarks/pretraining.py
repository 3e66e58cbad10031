"""Speed and memory of METRO-base pretraining beside the plain way and beside T5.

Ways to train on 512-token samples with the same optimiser, each in a process of its own:

* ``metro``: :class:`metro.pretraining.model.MetroPretrainingModel` as it is trained, on a GPU with
  all Triton kernels that prove themselves (the others are listed in the results as
  ``faults``); ``no kernels``: the same without them; ``metro bf16`` (CPU): in autocast.
* ``plain``: the same weights computed as the original does, see `plain_pretraining.py`; ``plain,
  heap kept`` (CPU): the same with memory kept as in a training by METRO.
* ``compiled`` (GPU): METRO's model without ``fuse``, by torch.compile.
* ``t5 spans``, ``t5 spans bf16``, ``t5 plain`` (CPU): the same of span corruption of as many source
  tokens; ``t5`` (GPU): Hugging Face T5-v1.1-base of it.

"x plain" and "of plain" compare with the plain way of the same task. On the CPU seconds are
processor time of one thread.

On a GPU without padding and with samples of half to full length. A way that fails costs the
rows that it has not yet: results are written after each row.

Lower bound: the FLOPs of :func:`metro_flops_per_token` (1.5 GFLOP for METRO-base, forward and
backward, only what masked positions need in last layers and projections) or of
:func:`span_flops_per_token` over the rate of one large product in the same run and type; "of matrix
peak" is that share. On a GPU models are bf16, as with fairseq's
``--bf16``: the optimiser has float32 copies of the weights and float32 moments.

Prints a table and writes ``benchmarks/results/pretraining.json``, of another size than the base's
``pretraining_SIZE.json``. That all compute the same is for `pretraining_curves.py` to say; speed is
measured with the published dropout.
"""

import argparse
import os
import statistics
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F

from benchmarks.common import (
    environment,
    measure_each,
    measure_isolated,
    print_table,
    write_results,
)
from benchmarks.plain_pretraining import make_plain, plain_loss, plain_span_loss
from benchmarks.timing import measure_rates, seconds_now, subject_on, take_proven_kernels
from metro.fusion import fuse
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.ops.adamw import adamw_step
from metro.ops.kernels.self_check import known_faults
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel, T5PretrainingModel
from metro.training.memory import Heap

VOCAB_SIZE, SENTINEL, LENGTH = 32768 + 512, 32768, 512
SPANS_LENGTH = 114
"""Target tokens of 512 source tokens (Raffel et al.)."""
WAYS = {
    "cpu": (
        *("metro", "plain", "plain, heap kept", "metro bf16"),
        *("t5 spans", "t5 plain", "t5 plain, heap kept", "t5 spans bf16"),
    ),
    "cuda": ("metro", "plain", "no kernels", "compiled", "t5"),
}
SIZES = {"base": {}, "small": dict(d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4)}
AUXILIARY_LAYERS = {"base": 4, "small": 1}
TARGETS = {
    "tokens/s": (">=", 250_000),
    "of matrix peak": (">=", 0.47),
    "x plain": (">=", 3),
    "of plain": ("<=", 0.4),
}
"""Of METRO-base on one H100 or H200 in bf16; "of plain" is of its peak memory."""


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


def span_flops_per_token(config: MetroT5Config) -> float:
    """The same of span corruption per source token; the decoder reads fewer tokens than that.

    Keys and values of cross-attention are of source tokens, 2 D^2 each; the projection to the
    vocabulary is at every target token.
    """
    d, f, share = config.d_model, config.d_ff, SPANS_LENGTH / LENGTH
    encoder = 2 * (4 * d * d + 2 * d * f) + 4 * LENGTH * d
    keys_and_values = 2 * 2 * d * d
    decoder = 2 * (6 * d * d + 2 * d * f) + 2 * SPANS_LENGTH * d + 4 * LENGTH * d
    forward = (
        encoder * config.num_layers
        + (keys_and_values + share * decoder) * config.num_decoder_layers
        + share * 2 * config.vocab_size * d
    )
    return 3 * forward


def build_metro(size: str, dropout: float) -> MetroPretrainingModel:
    """METRO-base as published, or a small one to try the script."""
    torch.manual_seed(0)
    config = MetroT5Config(vocab_size=VOCAB_SIZE, dropout_rate=dropout, **SIZES[size])
    return MetroPretrainingModel(config, MetroPretrainingConfig(AUXILIARY_LAYERS[size]))


def metro_batch(batch_size: int, padded: bool, length=LENGTH, sentinel=SENTINEL) -> dict:
    """Random tokens, 15 % masked; ``padded``: samples of half to full length."""
    generator = torch.Generator().manual_seed(1)
    original = torch.randint(4, sentinel, (batch_size, length), generator=generator)
    is_masked = torch.rand(original.shape, generator=generator) < 0.15
    if padded:
        lengths = torch.linspace(length // 2, length, batch_size).long()
        is_padding = torch.arange(length) >= lengths.unsqueeze(1)
        original.masked_fill_(is_padding, MetroT5Config().pad_token_id)
        is_masked &= ~is_padding
    return {
        "masked_ids": original.masked_fill(is_masked, sentinel),
        "original_ids": original,
        "is_masked": is_masked,
        "decoder_input_ids": F.pad(original[:, :-1], (1, 0), value=sentinel),
        "sampling_seed": torch.arange(batch_size),
        "max_masked": int(is_masked.sum(1).max()),
        "has_padding": padded,
    }


def build_step(way: str, size: str, dropout: float):
    """A model in training mode, and a function from a batch to its loss."""
    if way == "t5":
        model = build_t5(size, dropout).train()
        return model, lambda inputs: model(**inputs, use_cache=False).loss
    of_spans = way.startswith("t5")
    model = build_metro(size, dropout).train()
    given = {} if of_spans else {"objective": MetroObjective(weighted_lm=True)}
    model = T5PretrainingModel(model.main) if of_spans else model
    if "plain" in way:
        make_plain(model)
        loss_of = plain_span_loss if of_spans else plain_loss
        return model, lambda inputs: loss_of(model, inputs, **given)
    run = torch.compile(model) if way == "compiled" else fuse(model)

    def loss_of(inputs: dict) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
            return run(**inputs, **given).total

    return model, loss_of


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


def t5_batch(batch_size: int, way: str = "t5") -> dict:
    """512 corrupted source tokens and the target tokens that go with them."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, 32000, (batch_size, LENGTH), generator=generator)
    target = torch.randint(4, 32000, (batch_size, SPANS_LENGTH), generator=generator)
    if way == "t5":
        return {"input_ids": source, "labels": target}
    shifted = F.pad(target[:, :-1], (1, 0), value=SENTINEL)
    given = {"input_ids": source, "target_ids": target, "decoder_input_ids": shifted}
    return {**given, "has_padding": False}


class Optimizer:
    """AdamW as fairseq-train has it; half precision is trained by way of float32 copies."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-4):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.in_half = self.params[0].dtype != torch.float32
        self.masters = [p.detach().float() for p in self.params]  # in float32 the weights
        self.moments = [[torch.zeros_like(m) for m in self.masters] for _ in range(2)]
        self.lr, self.num_steps = lr, 0

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights and forget the gradients."""
        self.num_steps += 1
        used = [i for i, p in enumerate(self.params) if p.grad is not None]
        grads = [self.params[i].grad.float() for i in used]
        for param in self.params:
            param.grad = None
        of_used = [[x[i] for i in used] for x in (self.masters, *self.moments)]
        settings = dict(lr=self.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
        adamw_step(of_used[0], grads, *of_used[1:], self.num_steps, **settings)
        if self.in_half:
            torch._foreach_copy_(self.params, self.masters)


def on_device(batch: dict, device: str) -> dict:
    """The tensors; numbers stay on the host."""
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in batch.items()}


def time_steps(way: str, size: str, batch_size: int, num_steps: int, device: str) -> Iterator[dict]:
    """Seconds of each training step (forward, backward, AdamW) once warm, and GPU memory.

    On a GPU for batches without padding and with it; ``t5`` without.
    """
    os.environ["METRO_TRITON"] = "0"
    if way == "metro":
        take_proven_kernels()
    if device == "cpu":
        torch.set_num_threads(1)
    heap = Heap() if device == "cpu" and not way.endswith("plain") else None
    model, loss_of = build_step(way, size, dropout=0.1)
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    optimizer = Optimizer(model)
    of_spans = way.startswith("t5")
    for padded in (False, True) if device == "cuda" and not of_spans else (False,):
        batch = t5_batch(batch_size, way) if of_spans else metro_batch(batch_size, padded)
        inputs, seconds = on_device(batch, device), []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(num_steps + (3 if device == "cuda" else 2)):
            start = seconds_now(device)
            loss_of(inputs).backward()
            optimizer.step()
            if heap:
                heap.tidy()
            seconds.append(seconds_now(device) - start)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        padding = "half to full" if padded else "none"
        run = {"padding": padding, "seconds": seconds[-num_steps:], "gpu_bytes": peak}
        yield run | {"faults": known_faults()}


def subject_of(name: str, size: str) -> str:
    """Name results by the model's size, so that another size leaves those of the base alone."""
    return name if size == "base" else f"{name}_{size}"


def rows_of(runs: dict[str, list[dict]], batch_size: int, bounds: dict[str, float]) -> list[dict]:
    """A row for each way and padding, beside ``plain`` of the same padding where it ran.

    Args:
        runs: by way.
        batch_size: samples of a step.
        bounds: tokens/s of each way at the rate of a large product.
    """
    rows = []
    for way, found in runs.items():
        for run in found:
            speed = batch_size * LENGTH / statistics.median(run["seconds"])
            if run["padding"] != "none":
                speed *= 0.75  # of the tokens are no padding
            row = {"way": way, "padding": run["padding"], "tokens/s": speed, "x plain": None}
            is_full = run["padding"] == "none" and way in bounds
            row["of matrix peak"] = speed / bounds[way] if is_full else None
            rows.append(row | {"peak GiB": run["bytes"] / 2**30, "of plain": None})
    plain = {(row["way"], row["padding"]): row for row in rows}
    for row in rows:
        way = "t5 plain" if row["way"].startswith("t5") and "t5 plain" in runs else "plain"
        if beside := plain.get((way, row["padding"])):
            row["x plain"] = row["tokens/s"] / beside["tokens/s"]
            row["of plain"] = row["peak GiB"] / beside["peak GiB"]
    return rows


def judge(rows: list[dict], failed: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Say which targets ``metro`` meets without padding."""
    row = next((row for row in rows if (row["way"], row["padding"]) == ("metro", "none")), {})
    reason = "failed" if "metro" in failed else "not measured"
    lines = []
    for name, (sign, target) in TARGETS.items():
        value = row.get(name)
        met = value is not None and (value >= target if sign == ">=" else value <= target)
        shown = reason if value is None else f"{value:,.3g}"
        lines.append(f"{name}: {shown}, target {sign} {target:,}: {'met' if met else 'NOT met'}")
    return lines


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--size", choices=["base", "small"], default="base")
    parser.add_argument("--batch-size", type=int, help="samples of 512 tokens a step (6, GPU: 32)")
    parser.add_argument("--steps", type=int, help="timed steps in a round (1, GPU: 10)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds over all ways, in turn")
    args = parser.parse_args()
    batch_size = args.batch_size or (32 if args.device == "cuda" else 6)
    num_steps = args.steps or (10 if args.device == "cuda" else 1)
    config = MetroT5Config(vocab_size=VOCAB_SIZE, **SIZES[args.size])
    flops = metro_flops_per_token(config, AUXILIARY_LAYERS[args.size])
    in_bf16 = {way: way.endswith("bf16") for way in WAYS[args.device]}
    types = {False: None, True: torch.bfloat16}
    rates = {
        rounded: measure_isolated(measure_rates, args.device, types[rounded]).value[0]
        for rounded in set(in_bf16.values())
    }
    bounds = {
        way: rates[rounded] / (span_flops_per_token(config) if way.startswith("t5 ") else flops)
        for way, rounded in in_bf16.items()
        if way != "t5"  # of transformers: another architecture
    }
    runs, failed, faults = {}, {}, []
    environment()  # looked at before anything is timed

    def store() -> None:
        rows = rows_of(runs, batch_size, bounds)
        is_goal = args.device == "cuda" and args.size == "base"
        targets = judge(rows, failed) if is_goal else []
        write_results(
            subject_on(args.device, subject_of("pretraining", args.size)),
            rows,
            size=args.size,
            batch_size=batch_size,
            matrix_peak_tflops=rates[False] / 1e12,
            bf16_peak_tflops=rates[True] / 1e12 if True in rates else None,
            flops_per_token=flops,
            runs=runs,
            failed=failed,
            faults=faults,
            targets=targets,
        )
        print("\n".join(targets), flush=True)

    for way in WAYS[args.device] * args.rounds:
        given = (way, args.size, batch_size, num_steps, args.device)
        try:
            for i, measured in enumerate(measure_each(time_steps, *given)):
                run, known = measured.value, runs.setdefault(way, [])
                faults = run["faults"] if way == "metro" else faults
                peak = run["gpu_bytes"] or measured.peak_bytes
                print(f"{way}: {run['seconds']} s, {peak / 2**30:.2f} GiB", flush=True)
                if i == len(known):
                    known.append({"padding": run["padding"], "seconds": [], "bytes": 0})
                known[i]["seconds"] += run["seconds"]
                known[i]["bytes"] = max(known[i]["bytes"], peak)
                store()
        except RuntimeError as error:
            failed[way] = str(error)
            store()
    title = f"METRO-{args.size} pretraining on {args.device}, {batch_size} x {LENGTH} tokens a step"
    if runs:
        print_table(rows_of(runs, batch_size, bounds), title)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
