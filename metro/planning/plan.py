"""What fits on GPUs of a size, with which options, by `metro.planning.memory`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metro.finetuning.settings import FinetuningSettings
from metro.models.placement import BITS
from metro.models.registry import find_registered, show_parameters
from metro.planning.memory import Batch, Memory, Training, inference, of_machine, training
from metro.planning.settings import PlanSettings
from metro.planning.sizes import Sizes
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import UserError, counted
from metro.utils.table import Table

CONTEXT, FRAGMENTED = 1e9, 0.05
"""Bytes of a GPU that the driver takes, and the share that is lost between tensors."""
MOST = 512
"""Examples of a micro-batch that are tried."""
TOKENS = [65536 // 2**k for k in range(7)]
"""Tokens of a batch that is scored on a GPU: the default, and fewer."""
GPUS_OF_A_MACHINE = 8
NOTHING = "nothing fits: more GPUs, or larger ones"
EXTRA = {
    "checkpointing": "--gradient-checkpointing",
    "fsdp": "--fsdp full",
    "offload": "--fsdp-offload",
    "lora": "--lora",
    "4bit": "--load-in 4bit",
}
WAYS: tuple[tuple[str, ...], ...] = (
    (),
    ("checkpointing",),
    ("fsdp",),
    ("fsdp", "checkpointing"),
    ("fsdp", "checkpointing", "offload"),
    ("lora",),
    ("lora", "checkpointing"),
    ("lora", "4bit"),
    ("lora", "4bit", "checkpointing"),
)
"""Ways to train, the most comfortable first."""


class Job(NamedTuple):
    """A model, and how its configuration trains it."""

    purpose: str
    """``finetune`` or ``pretrain``."""
    sizes: Sizes
    own: FinetuningSettings | PretrainingSettings
    how: Training
    """On one GPU; ``lora_r`` is that of a way that has adapters."""
    always: list[str]
    """Of `WAYS`, beside sharding: what the configuration does already."""
    batch: Callable[[int], Batch]
    """Of so many examples."""
    wanted: int
    """Examples of a micro-batch."""
    update: int
    """Examples of an update."""
    command: Callable[[str, int, int], str]
    """Of options, examples of a micro-batch, and micro-batches of an update."""
    names: dict[str, str] = EXTRA
    without: tuple[str, ...] = ()
    """Of `WAYS`: what the command lacks."""
    multiple: int = 1
    """More examples than this in a micro-batch are a multiple of it."""


class Way(NamedTuple):
    """A way to use or train a model."""

    purpose: str
    """``use``, ``finetune`` or ``pretrain``."""
    options: str
    """Of the command line."""
    memory: Memory
    """Of one GPU."""
    fits: bool
    most: int
    """Examples (``use``: tokens) of the largest batch that fits; 0: none."""
    command: str
    """To copy; with a batch that fits."""
    host: float = 0
    """Bytes of each machine's main memory, where the model is not loaded onto GPUs."""
    update: str = ""
    """What an update's batch is made of."""


@dataclass(frozen=True)
class Plan:
    """Ways to use and train a model, the most comfortable first."""

    title: str
    ways: list[Way]
    usable: float
    """Bytes of a GPU that tensors can take."""

    def best(self, purpose: str) -> Way | None:
        """Return the first way that fits."""
        return next((way for way in self.ways if way.purpose == purpose and way.fits), None)

    @property
    def tables(self) -> list[Table]:
        """A table for each purpose."""
        purposes = dict.fromkeys(way.purpose for way in self.ways)
        return [self._table(purpose) for purpose in purposes]

    def _table(self, purpose: str) -> Table:
        unit = "tokens" if purpose == "use" else "micro-batch"
        host = "" if purpose == "use" else "host GB|"
        header = f"{purpose} with|weights|gradients|optimizer|activations|GB|{host}fits|{unit}"
        rows = [
            [
                way.options or "nothing more",
                *(f"{part / 1e9:.1f}" for part in (*way.memory, way.memory.total)),
                *[f"{way.host / 1e9:.0f}"] * bool(host),
                "yes" if way.fits else "no",
                f"up to {way.most:,}" if way.fits else "",
            ]
            for way in self.ways
            if way.purpose == purpose
        ]
        best = self.best(purpose)
        notes = [best.update, f"$ {best.command}"] if best else [NOTHING]
        return Table(header.split("|"), rows, notes=[*filter(None, notes)])

    def __str__(self) -> str:
        tables = (str(table).replace("note: ", "") for table in self.tables)
        room = f"{self.usable / 1e9:.0f} GB of each GPU can be used, host: memory of a machine"
        return "\n\n".join([f"{self.title}; {room}", *tables])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{self.title}</p>" + "".join(table._repr_html_() for table in self.tables)


def plan(settings: PlanSettings | None = None, **options: Any) -> Plan:
    """Say what fits, reading no weights.

    Args:
        settings: all options, or give them one by one.
        options: fields of `PlanSettings`, such as ``model``, ``gpus`` and ``memory``.

    Raises:
        UserError: there is no such model or configuration, or it is of another kind.
    """
    settings = PlanSettings.of(settings, **options)
    usable = settings.memory * 1e9 * (1 - FRAGMENTED) - CONTEXT
    if settings.pretrain is not None:
        sizes, ways = _pretraining(settings, usable)
    else:
        sizes, ways = _finetuning(settings, usable)
    name = settings.pretrain or settings.model or settings.finetune
    title = (
        f"{name}: {show_parameters(sizes.weights)} weights, {counted(settings.gpus, 'GPU')} of "
        f"{settings.memory:g} GB"
    )
    return Plan(title, list(ways), usable)


def _finetuning(settings: PlanSettings, usable: float) -> tuple[Sizes, Iterator[Way]]:
    shipped = FinetuningSettings.shipped()
    config = settings.finetune or (settings.model if settings.model in shipped else None)
    registered = find_registered(settings.model) if settings.model else None
    given: dict[str, Any] = {
        name: getattr(settings, name)
        for name in (
            *("model", "objective", "batch_size", "optimizer"),
            *("max_input_length", "max_target_length", "precision"),
        )
    }
    if config is None and given["objective"] is None and registered is not None:
        given["objective"] = registered.method
    places = {"data": "DATA", "output_dir": "OUT"}
    own = FinetuningSettings.combine(config, {**places, **given})
    base = FinetuningSettings.combine(config, {**places, "model": own.model})
    sizes = Sizes.find(own.model)
    doubled = 2 if own.objective in ("flipped", "direct+ul") else 1

    def batch(examples: int) -> Batch:
        return Batch(doubled * examples, own.max_input_length, own.max_target_length)

    def command(options: str, examples: int, steps: int) -> str:
        words = ["metro finetune", f"--config {config}" * bool(config)]
        words += [f"--model {own.model}" * (settings.model is not None or not config)]
        words += ["--data DATA --output-dir OUT"]
        for name in given:
            if name not in ("model", "batch_size") and getattr(own, name) != getattr(base, name):
                words.append(f"--{name.replace('_', '-')} {getattr(own, name)}")
        words += [options, f"--batch-size {examples} --gradient-accumulation-steps {steps}"]
        return _launched(words, settings.gpus)

    of_update = base if config in shipped else own
    job = Job(
        "finetune",
        sizes,
        own,
        Training(own.precision != "fp32", own.optimizer, lora_r=own.lora_r),
        ["checkpointing"] * own.gradient_checkpointing
        + ["lora"] * own.lora
        + ([own.load_in] if own.load_in else []),
        batch,
        own.batch_size,
        of_update.batch_size
        * of_update.gradient_accumulation_steps
        * _gpus(shipped.get(str(config)), settings),
        command,
    )

    def ways() -> Iterator[Way]:
        yield from _use(settings, sizes, usable)
        yield from _train(job, settings, usable)

    return sizes, ways()


def _pretraining(settings: PlanSettings, usable: float) -> tuple[Sizes, Iterator[Way]]:
    given = {"data": "DATA", "output_dir": "OUT", "precision": settings.precision}
    own = PretrainingSettings.combine(settings.pretrain, given).resolved()
    sizes = Sizes.of(
        {
            "model_type": "metro_t5",
            "vocab_size": settings.vocabulary + own.tokens_per_sample,
            "d_model": own.encoder_embed_dim,
            "d_kv": (own.encoder_embed_dim or 0) // (own.encoder_attention_heads or 1),
            "num_heads": own.encoder_attention_heads,
            "d_ff": own.encoder_ffn_embed_dim,
            "num_layers": own.encoder_layers,
            "num_decoder_layers": own.decoder_layers,
            "max_positions": own.max_positions,
            "relative_attention_num_buckets": own.encoder_rp_bins,
        },
        str(settings.pretrain),
        (own.generator_layers or 0) if own.is_metro else 0,
    )
    length = own.tokens_per_sample
    target = length if own.is_metro else length // 4
    wanted = max(1, own.max_tokens // length)

    def command(options: str, examples: int, steps: int) -> str:
        batch = f"--max-tokens {examples * length} --update-freq {steps}"
        words = [f"metro pretrain --config {settings.pretrain} --data DATA --output-dir OUT"]
        words += [f"--precision {settings.precision}" * (settings.precision is not None)]
        return _launched([*words, options, batch], settings.gpus)

    job = Job(
        "pretrain",
        sizes,
        own,
        Training(own.precision != "fp32", "adam"),
        ["checkpointing"] * own.checkpoint_activations,
        lambda examples: Batch(examples, length, target),
        wanted,
        wanted * own.update_freq * _gpus(own.shipped().get(str(settings.pretrain)), settings),
        command,
        {**EXTRA, "checkpointing": "--checkpoint-activations"},
        without=("lora",),
        multiple=own.required_batch_size_multiple,
    )
    return sizes, _train(job, settings, usable)


def _gpus(shipped: Path | None, settings: PlanSettings) -> int:
    """Return the number of GPUs that a configuration's batches are for.

    One that comes with METRO says it in its first lines; others mean those that are planned.
    """
    if shipped is None:
        return settings.gpus
    found = re.search(r"(\d+) GPUs", shipped.read_text())
    return int(found[1]) if found else 1


def _train(job: Job, settings: PlanSettings, usable: float) -> Iterator[Way]:
    """Yield all ways to train.

    Raises:
        UserError: the configuration uses DeepSpeed.
    """
    own, gpus = job.own, settings.gpus
    if own.deepspeed:
        raise UserError(f"the memory of deepspeed ({own.deepspeed}) is not known: use fsdp")
    always = {*job.always, *["fsdp"] * bool(own.fsdp), *["offload"] * own.fsdp_offload}
    shards = gpus // _machines(gpus) if own.fsdp == "hybrid" else gpus
    for way in dict.fromkeys(tuple(name for name in way if name not in always) for way in WAYS):
        chosen = always | {*way}
        bits = [name for name in BITS if name in chosen]
        is_alone = gpus == 1 and "fsdp" in way
        if is_alone or {*way} & {*job.without} or len(bits) + ("fsdp" in chosen) > 1:
            continue
        how = job.how._replace(
            checkpointing="checkpointing" in chosen,
            shards=shards if "fsdp" in chosen else 1,
            replicas=1 if "fsdp" in chosen else gpus,
            offload="offload" in chosen,
            lora_r=job.how.lora_r if "lora" in chosen else 0,
            load_in=bits[0] if bits else None,
        )

        def steps(examples: int) -> int:
            return max(1, round(job.update / (gpus * examples)))

        def memory(examples: int, how: Training = how) -> Memory:
            accumulating = how._replace(accumulates=steps(examples) > 1)
            return training(job.sizes, job.batch(examples), accumulating)

        def distance(examples: int) -> tuple[int, int]:
            return abs(gpus * examples * steps(examples) - job.update), -examples

        tried = {*(2**k for k in range(int(math.log2(MOST)) + 1)), job.wanted}
        most = max((n for n in tried if memory(n).total <= usable), default=0)
        up_to = range(1, (min(job.wanted, most) or 1) + 1)
        least = job.multiple
        examples = min((n for n in up_to if n < least or n % least == 0), key=distance)
        made = gpus * examples * steps(examples)
        update = f"an update: {gpus} x {examples} x {steps(examples)} = {made} examples"
        update += f", the nearest to the configuration's {job.update}" * (made != job.update)
        yield Way(
            job.purpose,
            " ".join(job.names[name] for name in way),
            memory(examples),
            most > 0,
            most,
            job.command(" ".join(job.names[name] for name in way), examples, steps(examples)),
            of_machine(job.sizes, how, gpus // _machines(gpus)),
            update,
        )


def _use(settings: PlanSettings, sizes: Sizes, usable: float) -> Iterator[Way]:
    """Yield ways to evaluate and rank; each of several processes holds a copy, or all share one."""
    lengths = 1024, 256  # of the protocols
    for is_shared, options, bytes_each, load_in in (
        (False, "", 4, None),
        (False, "--dtype bfloat16", 2, None),
        (True, "--device-map auto", 4, None),
        (True, "--device-map auto --dtype bfloat16", 2, None),
        (False, "--dtype bfloat16 --load-in 8bit", 2, "8bit"),
        (False, "--dtype bfloat16 --load-in 4bit", 2, "4bit"),
    ):
        if is_shared and settings.gpus == 1:
            continue
        for tokens in TOKENS:
            batch = Batch(max(1, tokens // sum(lengths)), *lengths)
            memory = inference(sizes, batch, bytes_each, load_in)
            if is_shared:
                memory = memory._replace(weights=memory.weights / settings.gpus)
            if fits := memory.total <= usable:
                break
        more = f"--batch-tokens {tokens}" * (tokens != TOKENS[0])
        words = [f"metro evaluate {settings.model or 'MODEL'}", options, more]
        command = _launched(words, 1 if is_shared else settings.gpus)
        yield Way("use", options, memory, fits, tokens if fits else 0, command)


def _launched(words: list[str], gpus: int) -> str:
    """Put torchrun before a command for several processes."""
    line = " ".join(filter(None, words))
    if gpus == 1:
        return line
    nodes = _machines(gpus)
    of_nodes = f"--nnodes {nodes} " if nodes > 1 else ""
    processes = gpus // nodes
    return f"torchrun {of_nodes}--nproc_per_node {processes} $(which metro) {line[len('metro ') :]}"


def _machines(gpus: int) -> int:
    """Return the fewest machines with at most eight GPUs, and equally many."""
    return next(n for n in range(math.ceil(gpus / GPUS_OF_A_MACHINE), gpus + 1) if gpus % n == 0)
