"""FLIPPED training beside the published way of it: examples a second, memory, loss.

The published way: one example per micro-batch, its two encoder inputs padded to 512 and the
instruction to 128 tokens, log-probabilities over the whole vocabulary in float32 at all positions,
gradients accumulated. Ours: 10 examples of similar length at a time, padded to their longest, the
vocabulary in chunks and at real tokens only. Both compute the same mean over examples with the same
weights and without dropout, so that loss and gradient can be compared; both take the same Adafactor
step, once for 40 examples (published: 240), which costs as much as some examples. Ours trains once
more as by ``metro finetune --precision bf16``, which may change loss and gradient by its rounding.

"times as fast" compares examples a second, "by CPU time" the processor time of the two processes,
which other work on the machine disturbs less; with one thread on idle cores they agree. "times the
floor" is our processor time over that of the products with the weights, forward and backward and
without padding (`evaluation.product_flops`, three times), at the speed of one large product
measured in the same run and type.

Lengths are drawn like those of FLIPPED's mixture, its datasets in their published shares, in
METRO's 32k vocabulary: median 81 encoder tokens (a tenth above 175, at most 512), instructions of
21 (a tenth above 40). Batches are those of `metro finetune`: 64 are sorted by length together. Of
these every eighth is timed, in random order: together they are as long as all. The first update is
not timed, and some more take new memory.
"""

import argparse
import time
from functools import partial

import torch

from benchmarks.common import measure_isolated, print_table, write_results
from benchmarks.timing import subject_on

PAD, START, VOCAB_SIZE = 1, 2, 32_000
GROUP = 64  # batches sorted together
MICRO_BATCH = 10  # examples of ours at a time
SOURCE, TARGET = 512, 128


def build_model(kind: str, **given: int):
    """Build a small model, of other sizes if given: width 256, 4 + 4 layers, 32,000 entries."""
    torch.manual_seed(0)
    sizes = dict(d_model=256, d_kv=64, d_ff=1024, num_layers=4, num_heads=4, vocab_size=VOCAB_SIZE)
    sizes |= given
    ids = dict(pad_token_id=PAD, eos_token_id=START, decoder_start_token_id=START, dropout_rate=0.0)
    if kind == "METRO-T5":
        from metro.fusion import fuse
        from metro.modeling.configuration_metro_t5 import MetroT5Config
        from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration

        return MetroT5ForConditionalGeneration(MetroT5Config(**sizes, **ids)), fuse
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**sizes, **ids, feed_forward_proj="gated-gelu")
    return T5ForConditionalGeneration(config), lambda model: model


def draw_examples(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(right, wrong, target) ids; the two encoder inputs differ in their last tokens."""
    random = torch.Generator().manual_seed(1)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(4, VOCAB_SIZE, (length,), generator=random)

    examples = []
    for _ in range(count):
        source = int(torch.empty(1).log_normal_(4.39, 0.6, generator=random).clamp(16, SOURCE - 2))
        right = ids(source)
        wrong = torch.cat([right[:-2], ids(2)])
        target = int(torch.empty(1).log_normal_(3.04, 0.5, generator=random).clamp(6, TARGET - 1))
        examples.append((right, wrong, ids(target)))
    return examples


def padded(rows: list[torch.Tensor], width: int | None = None) -> torch.Tensor:
    width = width or max(map(len, rows))
    batch = torch.full((len(rows), width), PAD)
    for row, ids in zip(batch, rows, strict=True):
        row[: len(ids)] = ids
    return batch


def published_backward(model, examples) -> float:
    """Gradients of an update, one example after the other; returns the loss."""
    total = 0.0
    for right, wrong, target in examples:
        encoder = padded([right, wrong], SOURCE)
        target = padded([target], TARGET)
        decoder = torch.cat([torch.full((1, 1), START), target[:, :-1]], 1)
        logits = model(
            input_ids=encoder,
            attention_mask=encoder.ne(PAD),
            decoder_input_ids=decoder.repeat(2, 1),
            use_cache=False,
        ).logits
        log_p = logits.float().log_softmax(-1)
        log_p = log_p.gather(-1, target.repeat(2, 1).unsqueeze(-1)).squeeze(-1)
        is_token = target[0].ne(PAD)
        likelihood = -(log_p[0] * is_token).sum() / is_token.sum()
        unlikelihood = -((1 - log_p[1].exp() + 0.01).log() * is_token).sum() / is_token.sum()
        loss = (likelihood + 3 * unlikelihood) / len(examples)
        loss.backward()
        total += float(loss.detach())
    return total


def our_backward(model, examples, in_bf16: bool) -> float:
    """Gradients of an update, some examples of similar length at a time; returns the loss."""
    from metro.finetuning.losses import LossOptions, unlikelihood_loss

    total = 0.0
    for first in range(0, len(examples), MICRO_BATCH):
        some = examples[first : first + MICRO_BATCH]
        right, wrong, target = (padded(list(column)) for column in zip(*some, strict=True))
        options = LossOptions("flipped", PAD, mean="examples")
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = unlikelihood_loss(model, options, right, target, wrong)
        loss = loss.total * (len(some) / len(examples))
        loss.backward()
        total += float(loss.detach())
    return total


def draw_batches(batch_size: int, num_updates: int) -> list[list]:
    """Examples of each update, of similar length; as many updates of short as of long ones."""
    examples = sorted(draw_examples(batch_size * GROUP), key=lambda example: len(example[0]))
    order = torch.randperm(num_updates, generator=torch.Generator().manual_seed(2)).tolist()
    numbers = [GROUP * (2 * i + 1) // (2 * num_updates) for i in order]
    return [examples[i * batch_size :][:batch_size] for i in numbers]


def flops_of_example(kind: str, batch_size: int, num_updates: int) -> float:
    """Operations of the products of an example, on average; going back takes two of each."""
    from benchmarks.evaluation import product_flops
    from metro.evaluation.scoring.pair_scoring import Pair

    examples = [each for batch in draw_batches(batch_size, num_updates) for each in batch]
    pairs = [
        Pair(tuple(source.tolist()), tuple(target.tolist()))
        for right, wrong, target in examples
        for source in (right, wrong)
    ]
    model, _ = build_model(kind)
    return 3 * product_flops(model, pairs) / len(examples)


def train(way: str, kind: str, batch_size: int, num_updates: int, threads: int) -> dict:
    """Updates of one way: losses, the gradient norm of the first one, and seconds of the rest."""
    from transformers.optimization import Adafactor

    from metro.training.memory import Heap

    torch.set_num_threads(threads)
    heap = None if way == "published" else Heap()
    model, fuse = build_model(kind)
    model.train()
    backward = published_backward
    if way != "published":
        fuse(model)
        backward = partial(our_backward, in_bf16=way == "ours, bf16")
    optimizer = Adafactor(
        model.parameters(), lr=5e-5, scale_parameter=False, relative_step=False, warmup_init=False
    )
    batches = draw_batches(batch_size, num_updates)
    losses, norm, seconds, cpu_seconds = [], 0.0, 0.0, 0.0
    for number, batch in enumerate([batches[0], *batches]):
        start, cpu_start = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        losses.append(backward(model, batch))
        if number == 0:  # warm-up, and what is compared
            gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            norm = float(torch.stack(gradients).norm())
            continue
        optimizer.step()
        if heap:
            heap.tidy()
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
    return {
        "losses": losses,
        "gradient_norm": norm,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=40, help="examples of an update")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=["METRO-T5", "T5 v1.1"])
    options = parser.parse_args()
    from benchmarks.evaluation import product_speed

    torch.set_num_threads(options.threads)
    types = {"ours": torch.float32, "ours, bf16": torch.bfloat16}
    rates = {way: product_speed(256, "cpu", dtype) for way, dtype in types.items()}
    rows = []
    for kind in options.models:
        speeds, cpu_seconds, results = {}, {}, {}
        flops = flops_of_example(kind, options.batch_size, options.updates)
        for way in ("published", "ours", "ours, bf16"):
            arguments = (way, kind, options.batch_size, options.updates, options.threads)
            measured = measure_isolated(train, *arguments)
            result = results[way] = measured.value
            num_examples = options.batch_size * options.updates
            speeds[way] = num_examples / result["seconds"]
            cpu_seconds[way] = result["cpu_seconds"] / num_examples
            rows.append(
                {
                    "model": kind,
                    "way": way,
                    "examples/s": speeds[way],
                    "times as fast": speeds[way] / speeds["published"],
                    "CPU s/example": cpu_seconds[way],
                    "by CPU time": cpu_seconds["published"] / cpu_seconds[way],
                    "times the floor": (
                        cpu_seconds[way] * rates[way] / flops if way in rates else None
                    ),
                    "peak MiB": measured.peak_bytes / 2**20,
                    "loss": result["losses"][0],
                    "gradient norm": result["gradient_norm"],
                }
            )
        plain = results.pop("published")
        for way, allowed in (("ours", 1e-4), ("ours, bf16", 1e-2)):
            for one, other in zip(plain["losses"], results[way]["losses"], strict=True):
                assert abs(one - other) < allowed * abs(one), f"{kind}: losses {one}, {other}"
            norms = plain["gradient_norm"], results[way]["gradient_norm"]
            assert abs(norms[0] - norms[1]) < 10 * allowed * norms[0], f"{kind}: gradients {norms}"
    print_table(rows, f"FLIPPED training, {options.batch_size} examples an update")
    write_results(
        subject_on("cpu", "flipped_training"), rows,
        batch_size=options.batch_size, updates=options.updates, threads=options.threads,
    )  # fmt: skip


if __name__ == "__main__":
    main()
