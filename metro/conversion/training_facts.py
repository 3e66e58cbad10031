"""Facts on training in a fairseq checkpoint: for the model card and for ``training.json``."""

from pathlib import Path
from typing import Any

from metro.conversion.model_card import PAPER
from metro.data.prepared_folder import TEXT_MANIFEST
from metro.models.fairseq_checkpoint import FairseqCheckpoint, model_name
from metro.utils.files import read_json

# Group of settings -> the fields that an export keeps; None: all.
KEPT: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "task": None,
    "criterion": None,
    "optimizer": None,
    "lr_scheduler": None,
    "optimization": None,
    "dataset": ("max_tokens", "batch_size", "required_batch_size_multiple"),
    "common": ("seed", "fp16", "bf16", "memory_efficient_fp16", "amp"),
    "distributed_training": ("distributed_world_size",),
}


def kept_settings(checkpoint: FairseqCheckpoint) -> dict[str, Any]:
    """Select the settings that an export keeps, as JSON values without paths of this machine."""
    kept = {}
    for group, names in KEPT.items():
        fields = checkpoint.settings.get(group)
        if isinstance(fields, dict):
            kept[group] = {name: fields[name] for name in names or fields if name in fields}
    return without_paths(kept)


def without_paths(value: Any) -> Any:
    """Shorten every path to its last part; turn values that JSON lacks into text."""
    if isinstance(value, dict):
        return {str(name): without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        return ":".join(Path(part).name if "/" in part else part for part in value.split(":"))
    return value if isinstance(value, int | float | None) else str(value)


def training_file(checkpoint: FairseqCheckpoint) -> dict[str, Any]:
    """Build the content of ``training.json``."""
    return {
        "format": 1,
        "names": checkpoint.names,
        "settings": kept_settings(checkpoint),
        "history": without_paths(checkpoint.history),
        "losses": checkpoint.losses,
    }


def summary(checkpoint: FairseqCheckpoint) -> str:
    """Describe the model in one paragraph of its card."""
    task = checkpoint.task.get("_name")
    if task == "t5_metro":
        what = (
            "A METRO-T5 model, pretrained with signals that an auxiliary model generates, and not "
            "finetuned: it restores text, it does not follow instructions yet. Texts start with "
            "`<sen000>` in its decoder."
        )
    elif task == "t5":
        what = (
            "A T5 model, pretrained with span corruption and not finetuned: it fills in "
            "`<sen001>`, `<sen002>`, ..., it does not follow instructions yet. Texts start and "
            "end with `<sen000>` in its decoder."
        )
    else:
        what = "A prompt-finetuned METRO-T5 model."
    return f"{what} Architecture and method: {PAPER}."


def training_rows(checkpoint: FairseqCheckpoint, data: Path) -> dict[str, Any]:
    """Build the rows of the card's table on training.

    Args:
        checkpoint: the exported one.
        data: the folder with its vocabulary, which may also have the counts of its text.
    """
    settings, task = checkpoint.settings, checkpoint.task
    optimization, scheduler = settings.get("optimization") or {}, settings.get("lr_scheduler") or {}
    dataset, common = settings.get("dataset") or {}, settings.get("common") or {}
    criterion = settings.get("criterion") or {}
    objective = {
        "t5_metro": "METRO: masked tokens replaced by samples of the auxiliary model",
        "t5": "span corruption",
        "t5_prompt_finetuning": "prompt finetuning",
    }.get(str(task.get("_name")), task.get("_name"))
    rows: dict[str, Any] = {"objective": objective, "fairseq model": model_name(settings)}
    if checkpoint.auxiliary is not None:
        rows["layers of the auxiliary model"] = checkpoint.auxiliary.auxiliary_layers
        rows["RTD head"] = checkpoint.auxiliary.rtd_head
    rows["data"] = without_paths(task.get("data"))
    rows |= _counts(data)
    rows["tokens per example, at most"] = task.get("tokens_per_sample")
    updates = [run.get("num_updates") for run in checkpoint.history]
    rows["updates"] = " + ".join(f"{number:,}" for number in updates if number)
    rows["tokens per update, at most"] = _tokens_per_update(settings, dataset, optimization)
    rates = optimization.get("lr") or scheduler.get("lr")
    rows["learning rate"] = ", ".join(f"{rate:g}" for rate in rates) if rates else None
    rows["warm-up updates"] = scheduler.get("warmup_updates")
    rows["optimizer"] = (settings.get("optimizer") or {}).get("_name")
    rows["dropout"] = f"{checkpoint.config.dropout_rate:g}"
    for name, label in (
        ("rtd_loss_weight", "weight of the RTD loss"),
        ("discriminator_loss_weight", "weight of the language modelling loss"),
        ("label_smoothing", "label smoothing"),
    ):
        rows[label] = criterion.get(name)
    rows["half precision"] = next((kind for kind in ("bf16", "fp16") if common.get(kind)), "no")
    for name, label in (("valid", "validation loss, last"), ("best", "validation loss, best")):
        if name in checkpoint.losses:
            rows[label] = f"{checkpoint.losses[name]:.3f} bits"
    rows["note"] = "; ".join(checkpoint.notes)
    return {name: value for name, value in rows.items() if value not in (None, "")}


def _tokens_per_update(settings: dict, dataset: dict, optimization: dict) -> str | None:
    tokens, frequency = dataset.get("max_tokens"), optimization.get("update_freq") or [1]
    world = (settings.get("distributed_training") or {}).get("distributed_world_size") or 1
    return f"{tokens * frequency[0] * world:,}" if tokens else None


def _counts(data: Path) -> dict[str, str]:
    """Read the counts of the text that ``metro prepare-text`` has written."""
    try:
        counts = read_json(data / TEXT_MANIFEST)["counts"]
        return {
            "documents": f"{counts['documents']:,}",
            "tokens of training text": f"{counts['train_tokens']:,}",
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
