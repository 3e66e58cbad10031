"""Speed and memory of METRO-base pretraining beside the plain way and beside T5.

Three ways to train on 512-token samples with the same optimiser, each in a process of its own:

* ``metro``: :class:`metro.pretraining.model.MetroPretrainingModel` as the plugins train it.
* ``plain``: the same weights computed as the original does: every position projected to the
  vocabulary with float32 log-probabilities, whole last layers, the relative bias looked up for
  every query-key pair and repeated over batch and heads, attention weights materialised.
* ``t5``: Hugging Face T5-v1.1-base, span corruption of as many source tokens.

Floor: the FLOPs of :func:`metro_flops_per_token` (1.5 GFLOP for METRO-base, forward and backward,
only what masked positions need in last layers and projections) over the matrix rate measured in the
same run; "of matrix peak" is that share. On a GPU models and Adam states are bf16.

Prints a table and writes ``benchmarks/results/pretraining.json``. Losses of ``metro`` and ``plain``
must agree to 1e-5 in float32 without dropout; speed is measured with the published dropout.
"""

import argparse
import statistics
import time
from types import MethodType

import torch
import torch.nn.functional as F

from benchmarks.common import measure_isolated, print_table, write_results
from metro.fuse import fuse
from metro.modeling.attention_metro_t5 import Attention, relative_position_buckets
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.auxiliary import AuxiliaryConfig
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel

VOCAB_SIZE, SENTINEL, LENGTH = 32768 + 512, 32768, 512
WAYS = ("metro", "plain", "t5")


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
    return MetroPretrainingModel(config, AuxiliaryConfig(4 if size == "base" else 1))


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


def plain_attend(q, k, v, bias_HTT, visibility, dropout, return_weights=True):
    """Attention with weights, and with a bias that is repeated over the batch."""
    scale = q.shape[-1] ** -0.5
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q * scale, k, v))
    if bias_HTT is not None:
        scores = torch.baddbmm(bias_HTT.repeat(len(q), 1, 1), flat_q, flat_k.transpose(1, 2))
    else:
        scores = torch.bmm(flat_q, flat_k.transpose(1, 2))
    if visibility.is_causal:
        scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
    weights = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(weights, flat_v).unflatten(0, q.shape[:2]), None


def plain_bias(attention, length: int) -> torch.Tensor | None:
    """H,T,T: one lookup for every query-key pair."""
    if attention.relative_attention_bias is None:
        return None
    config = attention.config
    buckets = relative_position_buckets(
        config.relative_attention_num_buckets, config.relative_attention_max_distance, length
    )
    positions = torch.arange(length)
    pairs_TT = buckets[positions - positions[:, None] + length - 1]
    table = attention.relative_attention_bias
    return table(pairs_TT.to(table.weight.device)).permute(2, 0, 1).contiguous()


def make_plain(model: MetroPretrainingModel) -> None:
    """Switch a model to the plain way, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.bias_by_distance = MethodType(plain_bias, module)
            module.attend = plain_attend


def plain_loss(model: MetroPretrainingModel, batch, objective: MetroObjective) -> torch.Tensor:
    """The objective of the base configuration with everything computed everywhere."""
    original, is_masked = batch["original_ids"], batch["is_masked"]
    hidden = model.auxiliary.encoder(batch["masked_ids"]).last_hidden_state
    weight = model.auxiliary.encoder.embed_tokens.weight
    mlm_logits = model.auxiliary.lm_head(hidden[is_masked], weight).float()
    mlm = F.cross_entropy(mlm_logits, original[is_masked], reduction="sum")
    corrupted = batch.get("corrupted_ids")
    if corrupted is None:
        samples = torch.multinomial(mlm_logits.detach().softmax(-1), 1).squeeze(-1)
        corrupted = batch["masked_ids"].masked_scatter(is_masked, samples)

    encoded = model.main.encoder(corrupted).last_hidden_state
    decoded = model.main.decoder(batch["decoder_input_ids"], encoder_hidden_states=encoded)
    log_probs = model.main.lm_head(decoded.last_hidden_state).float().log_softmax(-1).flatten(0, 1)
    log_probs.argmax(-1)  # the logged accuracies are of all positions
    masked_log_probs, targets = log_probs[is_masked.flatten()], original[is_masked].unsqueeze(-1)
    nll = -masked_log_probs.gather(-1, targets).squeeze(-1)
    rtd_logits = model.rtd_head(encoded).squeeze(-1).float()
    lm = (nll * rtd_logits[is_masked].sigmoid().detach()).sum()
    is_replaced = corrupted.ne(original).float()
    rtd = F.binary_cross_entropy_with_logits(rtd_logits, is_replaced, reduction="sum")
    return mlm + lm + objective.rtd_weight * rtd / original.numel() * is_masked.sum()


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


def time_steps(way: str, size: str, batch_size: int, num_steps: int, device: str) -> dict:
    """Seconds of each training step (forward, backward, Adam) once warm, and GPU memory."""
    model, batch, loss_of = build_step(way, size, batch_size, dropout=0.1)
    if device == "cuda":
        model = model.to(device, torch.bfloat16)
        batch = {name: value.to(device) for name, value in batch.items()}
        if way == "metro":  # known on the host when a batch is made
            batch["max_masked"] = int(batch["is_masked"].sum(1).max())
            batch["has_padding"] = False
    optimizer = torch.optim.Adam(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    seconds = []
    for _ in range(num_steps + (3 if device == "cuda" else 1)):
        synchronize(device)
        start = time.perf_counter()
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": seconds[-num_steps:], "gpu_bytes": peak}


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
    if difference > 1e-5:
        raise SystemExit("metro and plain must agree to 1e-5")
    write_results(
        "pretraining" if args.device == "cpu" else "pretraining_gpu",
        rows,
        size=args.size,
        batch_size=batch_size,
        matrix_peak_tflops=peak_flops / 1e12,
        flops_per_token=flops,
        loss_difference=difference,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
