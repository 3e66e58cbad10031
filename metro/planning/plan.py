"""What fits on GPUs of a size, with which options, by `metro.planning.memory`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from metro.finetuning.settings import FinetuningSettings
from metro.models.registry import find_registered, show_parameters
from metro.planning.memory import Batch, Memory, Training, inference, training
from metro.planning.settings import PlanSettings
from metro.planning.sizes import Sizes
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import counted
from metro.utils.table import Table

CONTEXT, FRAGMENTED = 1e9, 0.05
"""Bytes of a GPU that the driver takes, and the share that is lost between tensors."""
MOST = 512
"""Examples of a micro-batch that are tried."""
SCORED_TOKENS = 65536, 1024
"""Tokens of a batch that is scored on a GPU: by default, and the least that is tried."""
GPUS_OF_A_MACHINE = 8
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
        header = f"{purpose} with|weights|gradients|optimizer|activations|GB|fits|{unit}"
        rows = [
            [
                way.options or "nothing more",
                *(f"{part / 1e9:.1f}" for part in (*way.memory, way.memory.total)),
                "yes" if way.fits else "no",
                f"up to {way.most:,}" if way.fits else "",
            ]
            for way in self.ways
            if way.purpose == purpose
        ]
        best = self.best(purpose)
        last = best.command if best else "nothing fits: more GPUs, or larger ones"
        return Table(header.split("|"), rows, notes=[last])

    def __str__(self) -> str:
        tables = (str(table).replace("note: ", "$ ") for table in self.tables)
        room = f"{self.usable / 1e9:.0f} GB of each GPU can be used"
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
            *("max_input_length", "max_target_length"),
        )
    }
    if config is None and given["objective"] is None and registered is not None:
        given["objective"] = registered.method
    own = FinetuningSettings.combine(config, {"data": "DATA", "output_dir": "OUT", **given})
    sizes = Sizes.find(own.model)
    doubled = 2 if own.objective in ("flipped", "direct+ul") else 1

    def batch(examples: int) -> Batch:
        return Batch(doubled * examples, own.max_input_length, own.max_target_length)

    def command(options: str, examples: int) -> str:
        words = ["metro finetune", f"--config {config}" * bool(config)]
        words += [f"--model {own.model}" * (settings.model is not None or not config)]
        words += ["--data DATA --output-dir OUT"]
        shipped_already = {
            name: config is not None and given[name] is None
            for name in ("objective", "optimizer", "max_input_length", "max_target_length")
        }
        defaults = FinetuningSettings(model="m", data="d", output_dir="o")
        for name, is_shipped in shipped_already.items():
            if not is_shipped and getattr(own, name) != getattr(defaults, name):
                words.append(f"--{name.replace('_', '-')} {getattr(own, name)}")
        steps = math.ceil(own.batch_size * own.gradient_accumulation_steps / examples)
        words += [options, f"--batch-size {examples} --gradient-accumulation-steps {steps}"]
        return _launched(words, settings.gpus)

    def ways() -> Iterator[Way]:
        yield from _use(settings, sizes, usable)
        yield from _train(
            "finetune",
            settings,
            usable,
            own.batch_size,
            lambda how, examples: training(
                sizes,
                batch(examples),
                how._replace(
                    optimizer=own.optimizer,
                    accumulates=own.gradient_accumulation_steps > 1 or examples < own.batch_size,
                    lora_r=own.lora_r if how.lora_r else 0,
                ),
            ),
            command,
            EXTRA,
            always=[
                *["checkpointing"] * own.gradient_checkpointing,
                *["lora"] * own.lora,
                *["4bit"] * (own.load_in is not None),
            ],
        )

    return sizes, ways()


def _pretraining(settings: PlanSettings, usable: float) -> tuple[Sizes, Iterator[Way]]:
    given = {"data": "DATA", "output_dir": "OUT"}
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

    def command(options: str, examples: int) -> str:
        steps = math.ceil(own.update_freq * wanted / examples)
        batch = f"--max-tokens {examples * length} --update-freq {steps}"
        words = [f"metro pretrain --config {settings.pretrain} --data DATA --output-dir OUT"]
        return _launched([*words, options, batch], settings.gpus)

    ways = _train(
        "pretrain",
        settings,
        usable,
        wanted,
        lambda how, examples: training(
            sizes,
            Batch(examples, length, target),
            how._replace(optimizer="adam", accumulates=own.update_freq > 1 or examples < wanted),
        ),
        command,
        {**EXTRA, "checkpointing": "--checkpoint-activations"},
        without=("lora",),
    )
    return sizes, ways


def _train(
    purpose: str,
    settings: PlanSettings,
    usable: float,
    wanted: int,
    memory: Callable[[Training, int], Memory],
    command: Callable[[str, int], str],
    names: dict[str, str],
    always: list[str] | None = None,
    without: tuple[str, ...] = (),
) -> Iterator[Way]:
    """Yield all ways to train.

    Args:
        purpose, settings, usable: see above.
        wanted: examples of a micro-batch.
        memory: of a way and a number of examples.
        command: of options and a number of examples.
        names: what the command calls the options.
        always: options that are set already.
        without: options that the command lacks.
    """
    for way in WAYS:
        is_alone = settings.gpus == 1 and "fsdp" in way
        if is_alone or {*way} & {*(always or ()), *without}:
            continue
        chosen = {*way, *(always or ())}
        how = Training(
            half=settings.precision == "bf16",
            checkpointing="checkpointing" in chosen,
            shards=settings.gpus if "fsdp" in chosen else 1,
            replicas=1 if "fsdp" in chosen else settings.gpus,
            offload="offload" in chosen,
            lora_r=int("lora" in chosen),
            load_in="4bit" if "4bit" in chosen else None,
        )
        sizes = [2**k for k in range(int(math.log2(MOST)) + 1)]
        fitting = [n for n in {*sizes, wanted} if memory(how, n).total <= usable]
        most = max(fitting, default=0)
        examples = min(wanted, most) or 1
        options = " ".join(names[name] for name in way)
        yield Way(
            purpose, options, memory(how, examples), most > 0, most, command(options, examples)
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
        tokens = SCORED_TOKENS[0]
        while True:
            batch = Batch(max(1, tokens // sum(lengths)), *lengths)
            memory = inference(sizes, batch, bytes_each, load_in)
            if is_shared:
                memory = memory._replace(weights=memory.weights / settings.gpus)
            fits = memory.total <= usable
            if fits or tokens == SCORED_TOKENS[1]:
                break
            tokens //= 2
        more = f"--batch-tokens {tokens}" * (tokens != SCORED_TOKENS[0])
        words = [f"metro evaluate {settings.model or 'MODEL'}", options, more]
        command = _launched(words, 1 if is_shared else settings.gpus)
        yield Way("use", options, memory, fits, tokens if fits else 0, command)


def _launched(words: list[str], gpus: int) -> str:
    """Put torchrun before a command for several processes."""
    line = " ".join(filter(None, words))
    if gpus == 1:
        return line
    nodes = math.ceil(gpus / GPUS_OF_A_MACHINE)
    of_nodes = f"--nnodes {nodes} " if nodes > 1 else ""
    processes = min(gpus, GPUS_OF_A_MACHINE)
    return f"torchrun {of_nodes}--nproc_per_node {processes} $(which metro) {line[len('metro ') :]}"
