"""The Trainer's own options, with what every run of METRO wants of them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from metro.ops.dispatch import gpu_multiplies_bf16
from metro.utils.messages import MissingPackage, UserError

LONGEST_WAIT = 6 * 3600
"""Seconds that GPUs wait for one another: the first process prepares a mixture or joins weights
alone, and may need more than the usual half hour. If a process dies, torchrun ends the others."""


def backend(fsdp_offload: bool, cuda: bool) -> str | None:
    """Return what moves tensors between processes, None for accelerate's choice."""
    # Of norms and parts in the CPU's memory NCCL knows nothing. One process alone has no backend.
    return "cuda:nccl,cpu:gloo" if fsdp_offload and cuda and "LOCAL_RANK" in os.environ else None


def trainer_arguments(
    command: str,
    *,
    use_cpu: bool,
    precision: str,
    report_to: str,
    gradient_checkpointing: bool = False,
    deepspeed: str | None = None,
    fsdp_offload: bool = False,
    **options: Any,
):
    """Make a `TrainingArguments`, which joins the other processes of ``torchrun``.

    Args:
        command: such as ``metro finetune``, for messages.
        use_cpu: train on the CPU although there is a GPU.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        report_to: ``auto``, ``none``, or loggers separated by commas.
        gradient_checkpointing: recompute activations.
        deepspeed: JSON file of DeepSpeed's settings, if it shards the model.
        fsdp_offload: FSDP keeps its parts in the CPU's memory.
        options: further ones, by the names of transformers.

    Raises:
        UserError: the machine cannot train with these settings.
        MissingPackage: accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPackage(command, "accelerate", "train")
    from transformers import TrainingArguments
    from transformers.integrations import (
        get_reporting_integration_callbacks,
        unset_hf_deepspeed_config,
    )

    if deepspeed and not Path(deepspeed).is_file():
        raise UserError(f"there is no file {deepspeed}: give DeepSpeed's settings, in JSON")
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed: pip install deepspeed, or use --fsdp")
    cuda = torch.cuda.is_available() and not use_cpu
    if precision == "auto":
        # a CPU's depends on the model, see `metro.training.precision`
        precision = "bf16" if cuda and gpu_multiplies_bf16() else "fp32"
    if precision == "fp16" and not cuda:
        raise UserError(
            "precision fp16 needs a GPU; use --precision fp32, or bf16 on a CPU that is fast at it"
        )
    loggers = [] if report_to == "none" else report_to.split(",")
    if report_to == "auto":
        loggers = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    try:
        arguments = TrainingArguments(
            # Unless told so, accelerate joins the processes of torchrun on accelerators alone: on a
            # machine without one each would train a model of its own.
            use_cpu=not deepspeed and (use_cpu or not torch.accelerator.is_available()),
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            activation_checkpointing=gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            logging_nan_inf_filter=False,
            report_to=loggers,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            deepspeed=deepspeed,
            ddp_backend=backend(fsdp_offload, cuda),
            ddp_timeout=LONGEST_WAIT,
            **options,
        )
        get_reporting_integration_callbacks(loggers)
    except ValueError as error:  # an unknown schedule, optimizer or logger
        reason = " ".join(str(error).split())
        raise UserError(f"transformers' Trainer does not take these settings: {reason}") from None
    if deepspeed:  # models are loaded whole and sharded after that, as with FSDP
        unset_hf_deepspeed_config()
    if arguments.n_gpu > 1:
        raise UserError(
            f"one process sees {arguments.n_gpu} GPUs; start one per GPU: torchrun "
            f"--nproc_per_node {arguments.n_gpu} $(which metro) {command.split()[-1]} ... (or "
            "choose one GPU with CUDA_VISIBLE_DEVICES=0)"
        )
    return arguments
