"""A finetuning run, from its settings to a finished Hugging Face folder."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metro.data.own_prompts import own_choices, prepare_own_rows
from metro.data.prepared_folder import PROMPTS_MANIFEST
from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.stored import read_manifest
from metro.evaluation.scoring.rank_classification import check_distinct
from metro.finetuning.data import PromptData
from metro.finetuning.defaults import default_rate, default_updates
from metro.finetuning.losses import LossOptions
from metro.finetuning.model import load_trainable, set_up_for_training
from metro.finetuning.output_folder import (
    DATA,
    SETTINGS,
    finished_run,
    rows_identity,
    run_folder,
    save,
    write,
)
from metro.finetuning.settings import NEED_CHOICES, FinetuningSettings, check_sources
from metro.finetuning.validation import ValidationRows
from metro.models.loading import without_progress_bars
from metro.models.projection import position_limits, width_of
from metro.processes import Processes
from metro.sharding import SHARDS
from metro.training.arguments import trainer_arguments
from metro.training.memory import reserve_heap
from metro.training.output_folder import TrainingResult, ran_out_of_patience
from metro.training.precision import choose_precision
from metro.training.sharding import load_shards, made_once, shard
from metro.utils.checksums import refuse_damage
from metro.utils.files import naming, read_yaml
from metro.utils.identity import model_identity, refuse_not_finite
from metro.utils.locks import locked
from metro.utils.progress import Progress


def finetune(
    settings: FinetuningSettings | None = None,
    *,
    progress: bool | Progress = True,
    **options: Any,
) -> TrainingResult:
    """Train as the settings say and save the model into ``output_dir``; resume an earlier call.

    Args:
        settings: all options, or give them one by one.
        progress: show progress on stderr.
        options: fields of `FinetuningSettings`, such as ``model``, ``data`` and ``output_dir``.

    Raises:
        UserError: settings, data and model do not fit together.
    """
    settings = FinetuningSettings.of(settings, **options)
    check_sources(settings)
    return run_checked(settings, progress)


def run_checked(settings: FinetuningSettings, progress: bool | Progress = True) -> TrainingResult:
    """Train as `finetune` does, with settings whose model and data `check_sources` has checked."""
    with Progress.of(progress) as shown, without_progress_bars():
        args = training_arguments(settings)  # joins the other processes
        with ExitStack() as lock:
            if args.process_index == 0:
                lock.enter_context(locked(Path(settings.output_dir), inside=True))
            return _finetune_alone(settings, args, shown)


def _finetune_alone(settings: FinetuningSettings, args, progress: Progress) -> TrainingResult:
    """Finetune in an output folder that no other run writes into."""
    from transformers import set_seed

    from metro.training.trainer import DIVERGED, Stopped

    is_main_process = args.process_index == 0
    output = run_folder(settings)
    with args.main_process_first(local=False, desc="output_dir"):
        checkpoint = output.open(settings, settings.resume, is_main_process)
    set_seed(settings.seed)
    progress.say(f"loading {settings.model}")
    if args.device.type == "cpu":
        reserve_heap()
    load = partial(load_trainable, settings, args.bf16, args.device)
    model, tokenizer = made_once(load, settings, args)
    with args.main_process_first(local=False, desc="data"):
        folder = _data_folder(settings, progress)
        if is_main_process:
            refuse_damage(folder)
            inputs = {**model_identity(model, tokenizer), "data": rows_identity(folder)}
            places = {**dict.fromkeys(inputs, settings.model), "data": settings.data}
            output.check_inputs(inputs, places)
    if settings.max_steps is None:
        args.max_steps = default_updates(folder, settings, args.world_size)
        settings = replace(settings, max_steps=args.max_steps)
    done = finished_run(settings)
    if done is not None:
        progress.say(f"nothing to do: {done.folder} is finished after {done.num_updates} updates")
        return done
    choose_precision(args, settings.precision, width_of(model), progress)
    model = shard(set_up_for_training(model, settings), settings, args)
    if settings.learning_rate is None:
        args.learning_rate = default_rate(model, settings)
        progress.say(f"learning rate {args.learning_rate:.2g}, from the model's width")
    trainer = build_trainer(settings, args, model, tokenizer, folder, progress)
    with (
        naming(Path(settings.output_dir)),
        trainer.stop.listen("saving after the current batch, then stopping"),
    ):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Stopped:
            if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
        trainer.say_what_was_cut()
        state = trainer.state
        ended_early = ran_out_of_patience(state.stateful_callbacks, settings.early_stopping)
        if state.global_step < state.max_steps and not ended_early:
            progress.say(f"stopped after update {state.global_step} of {state.max_steps}")
            raise KeyboardInterrupt
        if state.best_metric is not None:
            best = f"{args.metric_for_best_model} {state.best_metric:.4g}"
            at = f"{state.best_global_step} of {state.global_step}"
            progress.say(f"the best model is kept, that after update {at}: {best}")
        weights = trainer.whole_state()
        if weights is not None:
            for name, _ in model.named_parameters():
                refuse_not_finite(name, weights[name], DIVERGED)
            save(model, weights, tokenizer, settings, state)
    return output.result(state.global_step, state.log_history)


def join_shards(checkpoint: Path, out: Path, dtype=None) -> int:
    """Write a sharded checkpoint-N of a run as a Hugging Face folder, in one process.

    Adapters are merged into the model that was finetuned.

    Args:
        checkpoint: within the run's output folder.
        out: the folder to write.
        dtype: of the weights; float32 by default.

    Returns:
        Parameters of the model.
    """
    settings = FinetuningSettings.of(**read_yaml(checkpoint.parent / SETTINGS))
    settings = replace(settings, output_dir=str(checkpoint.parent))
    model, tokenizer = load_trainable(settings)
    model = set_up_for_training(model, settings)
    load_shards(checkpoint / SHARDS, model)
    if settings.lora:
        model = model.merge_and_unload()
    write(model.to(dtype or torch.float32), None, tokenizer, settings, out)
    return model.num_parameters()


def build_trainer(
    settings: FinetuningSettings, args, model, tokenizer, folder: Path, progress: Progress
):
    """Make the Trainer with data, loss and batches as the settings say."""
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    from metro.finetuning.trainer import FinetuningTrainer
    from metro.training.stopping import Patience

    limits = position_limits(model.config)
    wanted = settings.max_input_length, settings.max_target_length
    lengths = limits.lengths(*wanted)
    if lengths != wanted:
        progress.say(
            f"the model has {limits.encoder} and {limits.decoder} positions: longer inputs and "
            "targets are cut"
        )
    encoder = PromptEncoder(
        tokenizer,
        max_source_length=lengths[0],
        max_target_length=lengths[1],
        truncation_side=settings.truncation_side,
    )
    for choices in own_choices(folder).values() if settings.asks_own_rows else ():
        check_distinct(encoder.targets(choices), choices)
    train_data = PromptData(
        folder,
        "train",
        settings.objective,
        encoder,
        seed=settings.seed,
        sampling=settings.sampling,
        limit=settings.limit,
    )
    valid_data, ranked = None, None
    if settings.asks_own_rows and not read_manifest(folder)["splits"]["valid"]:
        progress.say(f"no rows for validation: {settings.max_steps} updates, the last model kept")
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        args.save_strategy = SaveStrategy.STEPS if settings.save_steps else SaveStrategy.NO
    elif settings.eval_steps:
        valid_data = PromptData(
            folder,
            "valid",
            settings.objective,
            encoder,
            seed=settings.seed,
            sampling="capped",
            limit=settings.eval_limit,
            replace=False,
        )
        processes = Processes(args.process_index, args.world_size, args.device)
        if settings.fsdp:  # all of them gather the weights for each batch of any
            processes = Processes(0, 1, args.device)
        ranked = ValidationRows(valid_data, processes)
        if not ranked.examples or settings.deepspeed:  # which frees the projection too early
            ranked, args.metric_for_best_model, args.greater_is_better = None, "loss", False
    trainer = FinetuningTrainer(
        model,
        args,
        loss_options=LossOptions(
            settings.objective,
            model.config.pad_token_id,
            settings.mean,
            settings.unlikelihood_weight,
            settings.label_smoothing,
        ),
        train_data=train_data,
        valid_data=valid_data,
        batching=settings.batching,
        max_width=min(filter(None, limits), default=None),
        ranked=ranked,
        processing_class=tokenizer,
        progress=progress,
        saves_shards=bool(settings.fsdp),
    )
    if settings.early_stopping and args.load_best_model_at_end:
        trainer.add_callback(Patience(settings.early_stopping))
    return trainer


def training_arguments(settings: FinetuningSettings):
    """Make the Trainer's own options, a `TrainingArguments`.

    Raises:
        UserError: the machine cannot train with these settings.
    """
    scheduler = settings.lr_scheduler
    if scheduler == "constant" and settings.warmup_steps:
        scheduler = "constant_with_warmup"
    # one pass over memory; the formula is the same
    fused = "_fused" if torch.cuda.is_available() and not settings.use_cpu else ""
    optimizers = {"adamw": f"adamw_torch{fused}"}
    same_name = (
        *("output_dir", "gradient_accumulation_steps", "num_train_epochs"),
        *("warmup_steps", "adam_epsilon", "weight_decay", "max_grad_norm"),
        *("logging_steps", "save_steps", "save_total_limit", "eval_steps", "seed"),
        *("use_cpu", "precision", "report_to", "gradient_checkpointing", "deepspeed"),
        "fsdp_offload",
    )
    keep_best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        "restore_callback_states_from_checkpoint": True,
    }
    return trainer_arguments(
        "metro finetune",
        **{name: getattr(settings, name) for name in same_name},
        **(keep_best if settings.early_stopping else {}),
        learning_rate=settings.learning_rate or 0.0,  # 0: set when the model is there
        max_steps=settings.max_steps or -1,  # and these with the rows
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        lr_scheduler_type=scheduler,
        optim=optimizers.get(settings.optimizer, settings.optimizer),
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        dataloader_num_workers=settings.num_workers,
        save_strategy="best"
        if settings.early_stopping
        else "steps"
        if settings.save_steps
        else "no",
        eval_strategy="steps" if settings.eval_steps else "no",
    )


def _data_folder(settings: FinetuningSettings, progress: Progress) -> Path:
    """Return the folder of prepared prompts; a mixture given by its name is prepared now."""
    from metro.data.prompts.prepare import prepare_prompts

    folder = Path(settings.output_dir) / DATA
    if settings.asks_own_rows:
        needs_choices = settings.objective in NEED_CHOICES
        return prepare_own_rows(
            settings,
            settings.data,
            folder,
            valid_fraction=settings.valid_fraction,
            seed=settings.seed,
            needs_choices=f"objective {settings.objective}" if needs_choices else None,
            progress=progress,
        )
    if Path(settings.data).is_dir():
        return Path(settings.data)
    if not (folder / PROMPTS_MANIFEST).is_file():
        progress.say(f"preparing the mixture {settings.data} in {folder}")
    prepare_prompts(  # a finished folder is compared with what the settings name now
        mixture=settings.data,
        out=folder,
        format="jsonl",
        templates=settings.templates,
        data_dir=settings.data_dir,
        datasets=settings.dataset,
        progress=progress,
    )
    return folder
