"""A finetuning run from its settings to a finished Hugging Face folder.

``output_dir`` holds ``checkpoint-N`` (to resume from), ``runs`` (TensorBoard), ``finetune.yaml``
(the settings) and at the end the model itself: ``config.json`` there means that the run is
complete.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from metro.finetuning.data import PromptData
from metro.finetuning.losses import LossOptions
from metro.finetuning.settings import FinetuningSettings
from metro.utils.messages import MissingPackage, UserError

logger = logging.getLogger(__name__)

SETTINGS, STATE, PARTIAL = "finetune.yaml", "trainer_state.json", ".model.partial"
# May differ between a run and its continuation: they change nothing of what was trained so far.
MAY_CHANGE = {
    "output_dir", "max_steps", "num_train_epochs", "precision", "num_workers", "use_cpu",
    "logging_steps", "save_steps", "save_total_limit", "eval_steps", "eval_limit",
    "eval_batch_size", "resume", "report_to", "gradient_checkpointing", "attn_implementation",
    "templates", "data_dir",
}  # fmt: skip


class FinetuneResult(NamedTuple):
    """What `finetune` returns."""

    folder: Path
    """The finished model."""
    num_updates: int
    metrics: dict[str, float]
    """The last numbers that were logged."""


def finetune(settings: FinetuningSettings) -> FinetuneResult:
    """Train as the settings say and save the model into ``settings.output_dir``.

    Raises:
        ValueError: settings, data and model do not fit together.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPackage("finetuning", "accelerate", "train")
    from transformers import set_seed

    out = Path(settings.output_dir)
    arguments = training_arguments(settings)  # joins the other processes
    checkpoint = _starting_point(settings, out, arguments)
    done = finished_run(settings, out)
    if done is not None:
        print(f"nothing to do: {out} is finished after {done.num_updates} updates", flush=True)
        return done
    set_seed(settings.seed)
    if arguments.process_index == 0:
        print(f"loading {settings.model}", flush=True)
    model, tokenizer = load_for_training(settings)
    folder = _data_folder(settings, out, arguments)
    trainer = build_trainer(settings, arguments, model, tokenizer, folder)
    trainer.train(resume_from_checkpoint=checkpoint)
    if arguments.process_index == 0:
        save(model, tokenizer, out, settings)
    trainer.save_state()
    return FinetuneResult(out, trainer.state.global_step, _last_numbers(trainer.state.log_history))


def _last_numbers(log_history: list[dict]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for line in log_history:
        numbers |= {name: value for name, value in line.items() if name != "step"}
    return numbers


def finished_run(settings: FinetuningSettings, out: Path) -> FinetuneResult | None:
    """The result of an earlier run that went as far as these settings ask for."""
    path = out / STATE
    if not (path.is_file() and (out / "config.json").is_file()):
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    by_steps = settings.max_steps > 0
    reached = state["global_step"] if by_steps else state["epoch"] + 1e-6
    if reached < (settings.max_steps if by_steps else settings.num_train_epochs):
        return None
    return FinetuneResult(out, state["global_step"], _last_numbers(state["log_history"]))


def build_trainer(settings: FinetuningSettings, arguments, model, tokenizer, folder: Path):
    """The Trainer with data, loss and batches as the settings say."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from metro.data.prompts.encoding import PromptEncoder
    from metro.finetuning.progress import ConsoleCallback
    from metro.finetuning.trainer import trainer_class

    longest = getattr(model.config, "max_positions", None)  # T5 has no such limit
    lengths = [settings.max_input_length, settings.max_target_length]
    if longest is not None and max(lengths) > longest:
        logger.warning("the model has %d positions: longer inputs and targets are cut", longest)
        lengths = [min(length, longest) for length in lengths]
    encoder = PromptEncoder(tokenizer, max_source_length=lengths[0], max_target_length=lengths[1])
    common = dict(objective=settings.objective, encoder=encoder, seed=settings.seed)
    train_data = PromptData(
        folder, "train", sampling=settings.sampling, limit=settings.limit, **common
    )
    valid_data = None
    if settings.eval_steps:
        valid_data = PromptData(
            folder, "valid", sampling="capped", limit=settings.eval_limit, replace=False, **common
        )
    trainer = trainer_class()(
        model,
        arguments,
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
        max_width=longest,
        processing_class=tokenizer,
        callbacks=[ConsoleCallback()],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def training_arguments(settings: FinetuningSettings):
    """The Trainer's own options."""
    from transformers import Seq2SeqTrainingArguments

    cuda = torch.cuda.is_available() and not settings.use_cpu
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not cuda:
        raise UserError("precision fp16 needs a GPU; use fp32 (or bf16, slower on most CPUs)")
    report_to = [] if settings.report_to == "none" else settings.report_to.split(",")
    if settings.report_to == "auto":
        report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    # one pass over memory; the formula is the same
    optimizers = {"adamw": "adamw_torch_fused" if cuda else "adamw_torch"}
    # newer versions of transformers have another name for it and warn of the old one
    has_new_name = hasattr(Seq2SeqTrainingArguments, "activation_checkpointing")
    checkpointing = "activation_checkpointing" if has_new_name else "gradient_checkpointing"
    arguments = Seq2SeqTrainingArguments(
        output_dir=settings.output_dir,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        max_steps=settings.max_steps,
        num_train_epochs=settings.num_train_epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=(
            "constant_with_warmup"
            if settings.lr_scheduler == "constant" and settings.warmup_steps
            else settings.lr_scheduler
        ),
        warmup_steps=settings.warmup_steps,
        optim=optimizers.get(settings.optimizer, settings.optimizer),
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        **{
            checkpointing: settings.gradient_checkpointing,
            f"{checkpointing}_kwargs": {"use_reentrant": False},
        },
        dataloader_num_workers=settings.num_workers,
        use_cpu=settings.use_cpu,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_strategy="steps" if settings.save_steps else "no",
        save_total_limit=settings.save_total_limit,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        report_to=report_to,
        seed=settings.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        raise UserError(
            f"one process sees {arguments.n_gpu} GPUs; start one per GPU: torchrun "
            f"--nproc_per_node {arguments.n_gpu} $(which metro) finetune ... (or choose one GPU "
            "with CUDA_VISIBLE_DEVICES=0)"
        )
    return arguments


def load_for_training(settings: FinetuningSettings):
    """Model (weights in float32) and tokenizer."""
    from metro.fuse import fuse
    from metro.modeling.configuration_metro_t5 import MetroT5Config
    from metro.models.loading import load

    model, tokenizer = load(
        settings.model,
        dtype=torch.float32,
        attn_implementation=settings.attn_implementation,
        vocab=settings.vocab,
    )
    if isinstance(model.config, MetroT5Config):
        # after pretraining it is <sen000>; a prompt-finetuned METRO-T0 starts with </s>
        start = model.config.eos_token_id
        model.config.decoder_start_token_id = start
        model.generation_config.decoder_start_token_id = start
        model.generation_config.eos_token_id = start
        fuse(model)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    model.config.use_cache = True
    return model.train(), tokenizer


def set_dropout(model, dropout: float) -> None:
    """Use one dropout everywhere but after activations, which keep their own."""
    config = model.config
    for name in ("dropout_rate", "dropout", "attention_dropout_rate", "attention_dropout"):
        if isinstance(getattr(config, name, None), float | int):
            setattr(config, name, float(dropout))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif isinstance(vars(module).get("dropout"), float) and not hasattr(module, "activation"):
            module.dropout = dropout


def save(model, tokenizer, out: Path, settings: FinetuningSettings) -> None:
    """Write the finished model into ``out``; ``config.json`` is moved there last."""
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    facts = {
        "objective": settings.objective,
        "data": Path(settings.data).name,
        "learning rate": settings.learning_rate,
        "optimizer": settings.optimizer,
    }
    summary = f"METRO-T5, prompt-finetuned with the objective {settings.objective}."
    write_folder(model, tokenizer, partial, summary, facts)
    (out / "config.json").unlink(missing_ok=True)
    names = sorted(path.name for path in partial.iterdir() if path.name != "config.json")
    for name in [*names, "config.json"]:
        os.replace(partial / name, out / name)
    partial.rmdir()


def write_folder(model, tokenizer, folder: Path, summary: str, training=None) -> None:
    """A new Hugging Face folder; ``summary`` and ``training`` are for METRO's model card."""
    from metro.conversion.export import export_model
    from metro.modeling.configuration_metro_t5 import MetroT5Config

    if isinstance(model.config, MetroT5Config):
        export_model(model, tokenizer, folder, summary=summary, training=training)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _starting_point(settings: FinetuningSettings, out: Path, arguments) -> str | None:
    """The checkpoint to resume from; refuses a folder that holds something else."""
    if settings.resume not in ("auto", "never"):
        if not (Path(settings.resume) / STATE).is_file():
            raise UserError(
                f"resume is {settings.resume!r}, which is no complete checkpoint-N folder of "
                "metro finetune; use auto, never or such a folder"
            )
        return settings.resume
    with arguments.main_process_first(local=False, desc="output_dir"):
        earlier = out / SETTINGS
        if out.exists() and not earlier.is_file() and any(out.iterdir()):
            raise UserError(
                f"{out} is not empty and not of metro finetune; choose another --output-dir"
            )
        checkpoints = complete_checkpoints(out)
        if settings.resume == "never" and (checkpoints or (out / "config.json").is_file()):
            raise UserError(
                f"{out} holds a run already; choose another --output-dir, remove it, or leave "
                "--resume never out"
            )
        if checkpoints or (out / STATE).is_file():
            _refuse_other_settings(settings, earlier)
        out.mkdir(parents=True, exist_ok=True)
        if arguments.process_index == 0:
            earlier.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
    return str(checkpoints[-1]) if checkpoints else None


def complete_checkpoints(out: Path) -> list[Path]:
    """Folders checkpoint-N that were written to the end, by N (trainer_state.json comes last)."""
    found = {}
    for path in out.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / STATE).is_file():
            found[int(number[1])] = path
    return [found[number] for number in sorted(found)]


def _refuse_other_settings(settings: FinetuningSettings, earlier: Path) -> None:
    before = yaml.safe_load(earlier.read_text(encoding="utf-8"))
    now = settings.as_dict()
    changed = [
        f"{name} was {before.get(name)!r} and is {now[name]!r}"
        for name in now
        if name not in MAY_CHANGE and before.get(name, now[name]) != now[name]
    ]
    if changed:
        raise UserError(
            f"{earlier.parent} holds a run with other settings: {'; '.join(changed)}. Use the same "
            "ones to continue it, or another --output-dir"
        )


def _data_folder(settings: FinetuningSettings, out: Path, arguments) -> Path:
    """The prepared prompts; a mixture's name is prepared first, by one process."""
    from metro.data.prepared_folder import PROMPTS_MANIFEST

    if Path(settings.data).is_dir():
        return Path(settings.data)
    folder = out / "data"
    with arguments.main_process_first(local=False, desc="data"):
        if not (folder / PROMPTS_MANIFEST).is_file():
            _prepare(settings, folder)
    return folder


def _prepare(settings: FinetuningSettings, folder: Path) -> None:
    from metro.data.prompts.prepare import prepare_prompts

    print(f"preparing the mixture {settings.data} in {folder}", flush=True)
    prepare_prompts(
        settings.data,
        folder,
        format="jsonl",
        templates=settings.templates,
        data_dir=settings.data_dir,
        data_sets=settings.dataset,
    )
