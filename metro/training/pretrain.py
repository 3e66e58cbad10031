"""A pretraining run, from its settings to a finished Hugging Face folder."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from metro.data.indexed_file import IndexedFile, check_dictionaries, check_shards, check_split
from metro.data.prepared_folder import TEXT_MANIFEST
from metro.data.text.vocabulary import read_vocabulary
from metro.pretraining.settings import PretrainingSettings
from metro.sharding import SHARDS
from metro.training.output_folder import TRAINER_STATE, RunFolder, TrainingResult, last_metrics
from metro.utils.files import naming, read_json, read_yaml
from metro.utils.identity import digest
from metro.utils.locks import locked
from metro.utils.messages import UserError
from metro.utils.progress import Progress

SETTINGS = "pretrain.yaml"
"""Settings of a run, in its output folder."""
MAY_CHANGE = frozenset(
    {
        *("output_dir", "data", "max_update", "total_num_update", "num_workers", "report_to"),
        *("fp16", "bf16", "precision"),
        *("cpu", "log_interval", "save_interval_updates", "keep_interval_updates"),
        *("keep_interval_updates_pattern", "validate_interval_updates", "disable_validation"),
        *("checkpoint_activations", "compile", "keep_auxiliary", "resume", "max_tokens"),
        *("batch_size", "update_freq", "required_batch_size_multiple"),
        *("fsdp", "fsdp_offload", "deepspeed"),
    }
)
"""Settings that do not affect what was trained so far: a resumed run may have others."""


class Text:
    """The text of a run, shard by shard; the last one opened stays open."""

    def __init__(self, settings: PretrainingSettings, first_sentinel: int):
        self.settings, self.first_sentinel = settings, first_sentinel
        self._opened: tuple[Path, Any] | None = None

    def open(self, folder: Path, split: str):
        """Open the blocks of a split."""
        from metro.pretraining.dataset import PretrainingDataset

        return PretrainingDataset(
            IndexedFile(folder / split),
            self.settings,
            split,
            is_metro=self.settings.is_metro,
            first_sentinel=self.first_sentinel,
            max_width=self.settings.max_positions,
            name=str(folder / split),
        )

    def of_epoch(self, epoch: int):
        """Return the training text of an epoch."""
        folders = self.settings.folders
        folder = folders[(epoch - 1) % len(folders)]
        if self._opened is None or self._opened[0] != folder:
            self._opened = folder, self.open(folder, "train")
        return self._opened[1]


def check_data(settings: PretrainingSettings) -> int:
    """Check that the data is there and whole; return the size of its vocabulary.

    Raises:
        UserError: it is not; the message has the remedy.
    """
    if not settings.folders:
        raise UserError("data is empty; give a folder made by metro prepare-text")
    check_dictionaries(settings.folders)
    check_shards(settings.folders, "train")
    for folder in settings.folders:
        if (folder / "train1.idx").exists():
            raise UserError(
                f"{folder} has its text in several files (train1.idx), which fairseq-train reads; "
                "metro pretrain takes one folder for each: --data first:second"
            )
    if not settings.disable_validation:
        check_split(settings.folders[0] / "valid")
    return len(read_vocabulary(settings.folders[0]))


def data_identity(folder: Path) -> str:
    """Digest of a shard: what its manifest says, and the sizes of its files.

    Not of every byte, which would take minutes for a large corpus.
    """
    manifest = read_json(folder / TEXT_MANIFEST) or {}
    sizes = [[path.name, path.stat().st_size] for path in sorted(folder.glob("*.*"))]
    return digest([manifest.get("settings"), manifest.get("files"), sizes])


def pretrain(
    settings: PretrainingSettings | None = None,
    *,
    progress: bool | Progress = True,
    **options: Any,
) -> TrainingResult:
    """Train as the settings say and save the model into ``output_dir``; resume an earlier call.

    Args:
        settings: all options, or give them one by one; ``config`` names a file of them.
        progress: show progress on stderr.
        options: fields of `PretrainingSettings`, such as ``data`` and ``output_dir``.

    Raises:
        UserError: settings, data and model do not fit together.
    """
    if config := options.pop("config", None):
        settings = PretrainingSettings.combine(config, options)
    else:
        settings = PretrainingSettings.of(settings, **options)
    settings = settings.resolved()
    first_sentinel = check_data(settings)
    from metro.models.loading import without_progress_bars

    with Progress.of(progress) as shown, without_progress_bars():
        args = training_arguments(settings)  # joins the other processes
        with ExitStack() as lock:
            if args.process_index == 0:
                lock.enter_context(locked(Path(settings.output_dir), inside=True))
            return _pretrain_alone(settings, args, first_sentinel, shown)


def _pretrain_alone(
    settings: PretrainingSettings, args, first_sentinel: int, progress: Progress
) -> TrainingResult:
    """Pretrain in an output folder that no other run writes into."""
    from metro.training.trainer import Stopped

    output = RunFolder(Path(settings.output_dir), "metro pretrain", MAY_CHANGE)
    is_main_process = args.process_index == 0
    with args.main_process_first(local=False, desc="output_dir"):
        checkpoint = output.open(settings, settings.resume, is_main_process)
        if is_main_process:
            places = {f"data {i + 1}": folder for i, folder in enumerate(settings.folders)}
            inputs = {name: data_identity(folder) for name, folder in places.items()}
            output.check_inputs(inputs, {name: str(folder) for name, folder in places.items()})
    earlier = output.state()
    if earlier is not None and (done := earlier["global_step"]) >= settings.max_update:
        progress.say(f"nothing to do: {output.out} is finished after {done} updates")
        return output.result(done, earlier["log_history"])
    trainer = build_trainer(settings, args, first_sentinel, checkpoint, progress)
    with (
        naming(output.out),
        trainer.stop.listen("saving after the current batch, then stopping"),
    ):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Stopped:
            trainer.save_now()
        if trainer.state.global_step < settings.max_update:
            progress.say(
                f"stopped after update {trainer.state.global_step}; the same command resumes here"
            )
            raise KeyboardInterrupt
        state = trainer.whole_state()
        if state is not None:
            partial_model = output.new_partial()
            trainer.write(partial_model, state, settings.keep_auxiliary)
            output.take(partial_model, trainer.state)
    return output.result(trainer.state.global_step, trainer.state.log_history)


def join_shards(checkpoint: Path, out: Path, dtype=None, keep_auxiliary: bool = False) -> int:
    """Write a sharded checkpoint-N of a run as a Hugging Face folder, in one process.

    Args:
        checkpoint: within the run's output folder.
        out: the folder to write; one that is there is replaced.
        dtype: of the weights; float32 by default.
        keep_auxiliary: keep the auxiliary model and the RTD head.

    Returns:
        Parameters of the main model.
    """
    import torch

    from metro.pretraining.building import build_model
    from metro.training.pretraining_files import write_model
    from metro.training.sharding import load_shards

    settings = PretrainingSettings.of(**read_yaml(checkpoint.parent / SETTINGS))
    model = build_model(settings, len(read_vocabulary(settings.folders[0])))
    load_shards(checkpoint / SHARDS, model)
    state = read_json(checkpoint / TRAINER_STATE)
    valid = last_metrics(state["log_history"])
    losses = {"loss": valid["valid_loss"]} if "valid_loss" in valid else {}
    weights = model.to(dtype or torch.float32).state_dict()
    write_model(model, weights, settings, out, state["global_step"], losses, keep_auxiliary)
    return model.main.num_parameters()


def read_position(checkpoint: Path):
    """Read where in the data a checkpoint was saved."""
    from metro.pretraining.batches import Position
    from metro.training.pretraining_trainer import POSITION

    if (position := read_json(checkpoint / POSITION)) is None:
        raise UserError(f"{checkpoint} has no {POSITION}; resume from a checkpoint-N of this run")
    return Position(**position)


def build_trainer(
    settings: PretrainingSettings, args, first_sentinel: int, checkpoint: str | None, progress
):
    """Make the Trainer with model, data and losses as the settings say."""
    import torch
    from torch.utils.checkpoint import checkpoint as checkpoint_function
    from transformers import set_seed

    from metro.fusion import fuse
    from metro.pretraining.batches import (
        START,
        Share,
        Updates,
        cut_into_batches,
        dealt,
        load,
    )
    from metro.pretraining.building import build_model
    from metro.training.memory import reserve_heap
    from metro.training.precision import choose_precision
    from metro.training.pretraining_files import load_weights
    from metro.training.pretraining_trainer import PretrainingTrainer
    from metro.training.sharding import made_once, shard

    progress.say("building the model")
    if args.device.type == "cpu":
        reserve_heap()
    set_seed(settings.seed)

    def make():
        model = build_model(settings, first_sentinel)
        if settings.finetune_from_model and not checkpoint:
            progress.say(f"taking the weights of {settings.finetune_from_model}")
            load_weights(model, Path(settings.finetune_from_model), settings)
        return model

    model = fuse(made_once(make, settings, args))
    if settings.checkpoint_activations:
        recompute = partial(checkpoint_function, use_reentrant=False)
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                attributes = vars(module)
                attributes |= {"gradient_checkpointing": True}
                attributes |= {"_gradient_checkpointing_func": recompute}
    count = sum(parameter.numel() for parameter in model.parameters())
    choose_precision(args, precision_of(settings), model.config.d_model, progress)
    model = shard(model, settings, args)
    progress.say(f"{count:,} parameters; opening the data")
    text = Text(settings, first_sentinel)
    share = Share(args.process_index, args.world_size)
    position = read_position(Path(checkpoint)) if checkpoint else START
    valid = None
    if not settings.disable_validation:
        held_out = text.open(settings.folders[0], "valid")
        batches = cut_into_batches(held_out, settings)
        valid = partial(load, held_out, dealt(batches, share), batches[0])
    manifest = read_json(settings.folders[0] / TEXT_MANIFEST) or {}
    bits = (manifest.get("reference_bits") or {}) if settings.is_metro else {}
    return PretrainingTrainer(
        model,
        args,
        settings=settings,
        updates=Updates(
            text.of_epoch, settings, share, position, pin_memory=torch.cuda.is_available()
        ),
        position=position,
        valid=valid,
        reference_bits={
            f"{n}_bits": bits[n] for n in ("unigram", "bigram", "trigram") if n in bits
        },
        progress=progress,
        saves_shards=bool(settings.fsdp),
    )


def precision_of(settings: PretrainingSettings) -> str:
    """The setting, or what fairseq's names for it say."""
    if settings.precision != "auto":
        return settings.precision
    return "fp16" if settings.fp16 else "bf16" if settings.bf16 else "auto"


def training_arguments(settings: PretrainingSettings):
    """Make the Trainer's own options, a `TrainingArguments`.

    Raises:
        UserError: the machine cannot train with these settings.
    """
    from metro.training.arguments import trainer_arguments

    return trainer_arguments(
        "metro pretrain",
        use_cpu=settings.cpu,
        precision=precision_of(settings),
        report_to=settings.report_to,
        deepspeed=settings.deepspeed,
        fsdp_offload=settings.fsdp_offload,
        output_dir=settings.output_dir,
        max_steps=settings.max_update,
        max_grad_norm=settings.clip_norm,
        logging_steps=settings.log_interval,
        save_strategy="steps",  # and at the end
        save_steps=settings.save_interval_updates or settings.max_update,
        save_total_limit=None,
        seed=settings.seed,
        ignore_data_skip=True,
        torch_compile=settings.compile,
    )
