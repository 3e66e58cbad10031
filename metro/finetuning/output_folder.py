"""What is particular to the output folder of a finetuning run; the rest: `metro.training`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from metro.data.prompts.stored import read_manifest
from metro.finetuning.settings import FinetuningSettings
from metro.training.output_folder import RunFolder, TrainingResult, ran_out_of_patience
from metro.utils.identity import digest

if TYPE_CHECKING:
    from transformers import TrainerState

SETTINGS = "finetune.yaml"
"""Settings of a run, in its output folder."""
DATA = "data"
"""Prompts that a run has prepared, in its output folder."""
MAY_CHANGE = {
    *("output_dir", "max_steps", "num_train_epochs", "precision", "num_workers", "use_cpu"),
    *("logging_steps", "save_steps", "save_total_limit", "eval_steps", "eval_limit"),
    *("eval_batch_size", "resume", "report_to", "gradient_checkpointing", "attn_implementation"),
    *("templates", "data_dir", "early_stopping", "fsdp", "fsdp_offload", "deepspeed"),
}
"""Settings that do not affect what was trained so far: a resumed run may have others."""


def run_folder(settings: FinetuningSettings) -> RunFolder:
    """Return the output folder of these settings."""
    return RunFolder(Path(settings.output_dir), "metro finetune", frozenset(MAY_CHANGE))


def finished_run(settings: FinetuningSettings) -> TrainingResult | None:
    """Return the result of an earlier run that has trained as long as these settings ask for."""
    folder = run_folder(settings)
    if (state := folder.state()) is None:
        return None
    max_steps = settings.max_steps or -1
    ended_early = ran_out_of_patience(state["stateful_callbacks"], settings.early_stopping)
    reached = state["global_step"] if max_steps > 0 else state["epoch"] + 1e-6
    wanted = max_steps if max_steps > 0 else settings.num_train_epochs
    if reached < wanted and not ended_early:
        return None
    return folder.result(state["global_step"], state["log_history"])


def rows_identity(folder: Path) -> str:
    """Digest of a folder of prepared prompts: what its manifest says, and the sizes of its files.

    Not of every byte, which would take minutes for a large mixture.
    """
    manifest = read_manifest(folder)
    sizes = [[path.name, path.stat().st_size] for path in sorted(folder.glob("*/*/*.jsonl"))]
    return digest([manifest.get("settings"), manifest["splits"], manifest.get("files"), sizes])


def save(model, weights, tokenizer, settings: FinetuningSettings, state: TrainerState) -> None:
    """Write the finished model or adapter into the output folder."""
    folder = run_folder(settings)
    partial = folder.new_partial()
    if settings.lora:
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        model.get_base_model().generation_config.save_pretrained(partial)  # how it is asked
    else:
        write(model, weights, tokenizer, settings, partial)
    folder.take(partial, state)


def write(model, weights, tokenizer, settings: FinetuningSettings, out: Path) -> None:
    """Write a whole model with these weights as a Hugging Face folder."""
    from metro.conversion.export import write_model

    facts = {
        "objective": settings.objective,
        "data": Path(settings.data).name,
        "learning rate": settings.learning_rate,
        "optimizer": settings.optimizer,
    }
    summary = f"METRO-T5, prompt-finetuned with the objective {settings.objective}."
    write_model(model, tokenizer, out, state=weights, summary=summary, training=facts)
