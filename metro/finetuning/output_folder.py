"""Output folder of a finetuning run: where to resume, when it is finished, saving the model.

It holds ``checkpoint-N`` (to resume from), ``runs`` (TensorBoard), ``finetune.yaml`` (the
settings), ``inputs.json`` (digests of model and data) and at the end the model itself:
``config.json`` there means that the run is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple

import yaml

from metro.data.prompts.stored import read_manifest
from metro.finetuning.settings import FinetuningSettings
from metro.utils.files import read_json, read_yaml, write_json, write_text
from metro.utils.identity import digest
from metro.utils.locks import INSIDE
from metro.utils.messages import UserError

SETTINGS, INPUTS = "finetune.yaml", "inputs.json"
TRAINER_STATE, PARTIAL_MODEL = "trainer_state.json", ".model.partial"
MAY_CHANGE = {
    *("output_dir", "max_steps", "num_train_epochs", "precision", "num_workers", "use_cpu"),
    *("logging_steps", "save_steps", "save_total_limit", "eval_steps", "eval_limit"),
    *("eval_batch_size", "resume", "report_to", "gradient_checkpointing", "attn_implementation"),
    *("templates", "data_dir"),
}
"""Settings that do not affect what was trained so far: a resumed run may have others."""


class FinetuneResult(NamedTuple):
    """Result of `finetune`."""

    folder: Path
    """The finished model."""
    num_updates: int
    """Updates of all runs together that led to it."""
    metrics: dict[str, float]
    """Last logged value of each metric."""


def last_metrics(log_history: list[dict[str, float]]) -> dict[str, float]:
    """Return the last logged value of each metric."""
    metrics: dict[str, float] = {}
    for line in log_history:
        metrics |= {name: value for name, value in line.items() if name != "step"}
    return metrics


def finished_run(settings: FinetuningSettings) -> FinetuneResult | None:
    """Return the result of an earlier run that has trained as long as these settings ask for."""
    out = Path(settings.output_dir)
    state = read_json(out / TRAINER_STATE)
    if state is None or not (out / "config.json").is_file():
        return None
    by_steps = settings.max_steps > 0
    reached = state["global_step"] if by_steps else state["epoch"] + 1e-6
    if reached < (settings.max_steps if by_steps else settings.num_train_epochs):
        return None
    return FinetuneResult(out, state["global_step"], last_metrics(state["log_history"]))


def open_output(settings: FinetuningSettings, is_main_process: bool) -> str | None:
    """Make the output folder and note the settings there.

    Returns:
        The checkpoint to resume from, None for a fresh start.

    Raises:
        UserError: it holds something else, a run with other settings, or with ``resume="never"``
            any run.
    """
    if settings.resume not in ("auto", "never"):
        if not (Path(settings.resume) / TRAINER_STATE).is_file():
            raise UserError(
                f"resume is {settings.resume!r}, which is not a complete checkpoint-N folder of "
                "metro finetune; use auto, never or such a folder"
            )
        return settings.resume
    out = Path(settings.output_dir)
    earlier = out / SETTINGS
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not earlier.is_file() and names - {INSIDE}:
        raise UserError(
            f"{out} is not empty and not of metro finetune; choose another --output-dir"
        )
    checkpoints = complete_checkpoints(out)
    if settings.resume == "never" and (checkpoints or (out / "config.json").is_file()):
        raise UserError(
            f"{out} holds a run already; choose another --output-dir, remove it, or leave "
            "--resume never out"
        )
    if checkpoints or (out / TRAINER_STATE).is_file():
        _refuse_other_settings(settings, earlier)
    out.mkdir(parents=True, exist_ok=True)
    if is_main_process:
        write_text(earlier, yaml.safe_dump(settings.as_dict(), sort_keys=False))
    return str(checkpoints[-1]) if checkpoints else None


def complete_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoint-N folders that were written to the end, by N."""
    found = {}
    for path in out.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / TRAINER_STATE).is_file():  # which the Trainer writes last
            found[int(number[1])] = path
    return [found[number] for number in sorted(found)]


def _refuse_other_settings(settings: FinetuningSettings, earlier: Path) -> None:
    before, now = read_yaml(earlier), settings.as_dict()
    if not isinstance(before, dict):
        raise UserError(
            f"{earlier} does not hold the settings of the run there; choose another --output-dir"
        )
    for part in fields(settings):  # options that are newer than the run
        if part.default is not MISSING:
            before.setdefault(part.name, part.default)
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


def rows_identity(folder: Path) -> str:
    """Digest of a folder of prepared prompts: what its manifest says, and the sizes of its files.

    Not of every byte, which would take minutes for a large mixture.
    """
    manifest = read_manifest(folder)
    sizes = [[path.name, path.stat().st_size] for path in sorted(folder.glob("*/*/*.jsonl"))]
    return digest([manifest.get("settings"), manifest["splits"], manifest.get("files"), sizes])


def check_inputs(settings: FinetuningSettings, inputs: dict[str, str]) -> None:
    """Refuse to continue a run, or to call it finished, on another model or other data.

    Args:
        settings: of the run.
        inputs: digests of the model's parts and of the data.

    Raises:
        UserError: one differs from what the run in the output folder began with.
    """
    out = Path(settings.output_dir)
    before = read_json(out / INPUTS)
    if isinstance(before, dict) and (complete_checkpoints(out) or (out / TRAINER_STATE).is_file()):
        for name, now in inputs.items():
            if before.get(name) != now:
                place = settings.data if name == "data" else settings.model
                raise UserError(
                    f"{out} holds a run on other {name} of {place}: changed or replaced since; use "
                    "another --output-dir"
                )
    write_json(out / INPUTS, inputs)


def save(model, tokenizer, settings: FinetuningSettings) -> None:
    """Write the finished model into the output folder; ``config.json`` is moved there last."""
    out = Path(settings.output_dir)
    partial = out / PARTIAL_MODEL
    shutil.rmtree(partial, ignore_errors=True)
    facts = {
        "objective": settings.objective,
        "data": Path(settings.data).name,
        "learning rate": settings.learning_rate,
        "optimizer": settings.optimizer,
    }
    summary = f"METRO-T5, prompt-finetuned with the objective {settings.objective}."
    from metro.conversion.export import write_model

    write_model(model, tokenizer, partial, summary=summary, training=facts)
    (out / "config.json").unlink(missing_ok=True)
    names = sorted(path.name for path in partial.iterdir() if path.name != "config.json")
    for name in [*names, "config.json"]:
        os.replace(partial / name, out / name)
    partial.rmdir()
