"""Convert a Hugging Face folder to fairseq: METRO's exports and the released METRO-T0 folders.

``fairseq-train --finetune-from-model`` and ``--restore-file`` take the file: weights, settings of
plain values, no optimizer state. An export of a fairseq checkpoint gets back the parameter names of
that checkpoint; a released folder gets the original's, which the original's code and this
project's plugins both read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metro.conversion.fairseq_to_hf import cast
from metro.data.text.vocabulary import read_vocabulary
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.modeling.text_metro_t5 import VOCABULARY_FILES
from metro.models.fairseq_checkpoint import (
    PRETRAINING_TASKS,
    TIED,
    TRAINING,
    kept_pretraining_weights,
    read_training,
    shared_with_main,
)
from metro.models.fairseq_names import MODEL_OPTIONS, original_state, plugin_state
from metro.models.loading import read_config, read_tokenizer
from metro.models.reading import check_weights, expected_shapes, read_folder
from metro.models.source import check_as_written, check_model_folder
from metro.models.vocabulary_folder import build_tokenizer, check_vocabulary
from metro.utils.files import check_output, new_file, read_json
from metro.utils.messages import UserError, shortened

NAMES = ("original", "metro")
NO_HISTORY = {  # fairseq requires an entry, and reads only its number of updates
    "criterion_name": "LabelSmoothedCrossEntropyCriterion",
    "optimizer_name": "FairseqAdam",
    "lr_scheduler_state": {"best": None},
    "num_updates": 0,
}


@dataclass
class FairseqConversion:
    """Facts about a written checkpoint."""

    out: Path
    names: str
    """Naming scheme of its parameters: ``original`` or ``metro``."""
    has_auxiliary: bool
    """True if the auxiliary model and RTD head are in it."""
    model: str
    """fairseq's name of the model it belongs to."""
    vocabulary: Path | None
    """Folder with ``sp.model`` and ``dict.txt``, which a checkpoint does not hold; ``None`` if the
    Hugging Face folder lacks them."""
    dropped: list[str]
    """Descriptions of what fairseq has no place for."""


def to_fairseq(
    folder: str | Path,
    out: str | Path,
    *,
    names: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> FairseqConversion:
    """Write the model of a Hugging Face folder as a fairseq checkpoint.

    Args:
        folder: an export, or a released METRO-T0 folder.
        out: the ``.pt`` file to create.
        names: parameter names, ``"original"`` or ``"metro"``; by default those of the checkpoint
            that the folder was made from, the original's if that is unknown.
        dtype: of the weights; by default each tensor keeps its own.
        overwrite: replace an existing ``out``.

    Raises:
        UserError: ``out`` exists, or the folder is damaged, incomplete or of another model.
    """
    folder, out = Path(folder), Path(out)
    if names not in (None, *NAMES):
        raise UserError(f"names is {names!r}; use one of {', '.join(NAMES)}")
    check_output(out, overwrite, (folder,))
    config = _read_metro_config(folder)
    training = read_training(folder)
    names = names or training.get("names") or "original"
    if names not in NAMES:
        raise UserError(f"{folder / TRAINING} says names {names!r}; use one of {', '.join(NAMES)}")
    num_sentinels = _num_sentinels(folder)
    has_vocabulary = all((folder / name).is_file() for name in VOCABULARY_FILES)
    main = _main_weights(folder, config)
    dropped: list[str] = []
    if has_vocabulary:
        dropped = _without_other_rows(folder, config, num_sentinels, main)
        build_tokenizer(folder, config.vocab_size, num_sentinels)  # checks that it fits
    settings = training.get("settings") or _settings(config, num_sentinels)
    extra, auxiliary = kept_pretraining_weights(folder, settings, config)
    if auxiliary is None and str(settings["model"].get("_name")).startswith("t5_metro"):
        settings = {**settings, "model": _model_settings(config)}  # the main model alone is T5
    if names == "metro" or auxiliary is None:  # the original states the auxiliary model's here
        settings["model"]["encoder_layers"] = config.num_layers

    state = {f"main.{name}": tensor for name, tensor in cast(main, dtype).items()}
    for name in TIED[1:]:
        state[f"main.{name}"] = state["main.shared.weight"]  # one tensor in the file too
    state |= cast(extra, dtype)
    if auxiliary is not None:
        for name, main_name in shared_with_main(auxiliary).items():
            state[name] = state[f"main.{main_name}"]
    renamed = (
        original_state(state)
        if names == "original"
        else plugin_state(state, is_metro=auxiliary is not None)
    )
    content = {
        "args": None,
        "cfg": settings,
        "model": renamed,
        "criterion": None,
        "optimizer_history": training.get("history") or [NO_HISTORY],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True},
            **{
                name: training["losses"][key]
                for name, key in (("val_loss", "valid"), ("best", "best"))
                if key in (training.get("losses") or {})
            },
        },
        "last_optimizer_state": None,
    }
    with new_file(out, overwrite, (folder,)) as temporary:
        torch.save(content, temporary)
    return FairseqConversion(
        out,
        names=names,
        has_auxiliary=auxiliary is not None,
        model=str(settings["model"].get("_name")),
        vocabulary=folder if has_vocabulary else None,
        dropped=dropped,
    )


def _read_metro_config(folder: Path) -> MetroT5Config:
    check_model_folder(folder)
    check_as_written(folder)
    config = read_config(folder)
    if not isinstance(config, MetroT5Config):
        raise UserError(
            f"{folder} holds a model of type {config.model_type!r}; only METRO-T5 (metro_t5, "
            "fairseq_t5) can be converted to fairseq"
        )
    return config


def _main_weights(folder: Path, config: MetroT5Config) -> dict[str, torch.Tensor]:
    """Read and check the main model's tensors, the embedding matrix once."""
    tensors = read_folder(folder)
    known = [name for name in TIED if name in tensors]
    different = [name for name in known[1:] if not torch.equal(tensors[name], tensors[known[0]])]
    if different:
        raise UserError(
            f"{folder} holds different tensors as {known[0]} and {', '.join(different)}, where the "
            "model has one; the file is inconsistent"
        )
    if known:
        tensors = {"shared.weight": tensors[known[0]]} | {
            name: tensor for name, tensor in tensors.items() if name not in TIED
        }
    shapes = expected_shapes(MetroT5ForConditionalGeneration, config)
    expected = {name: shape for name, shape in shapes.items() if name not in TIED[1:]}
    check_weights(tensors, expected, str(folder), "the model that its config.json describes")
    return {name: tensors[name] for name in expected}


def _without_other_rows(
    folder: Path, config: MetroT5Config, num_sentinels: int, main: dict[str, torch.Tensor]
) -> list[str]:
    """Cut the embedding behind the sentinels, where fairseq's vocabulary ends; say what is lost."""
    num_rows = len(read_vocabulary(folder)) + num_sentinels
    tokenizer = read_tokenizer(str(folder))
    check_vocabulary(str(folder), config.vocab_size, len(tokenizer))
    added = [token for token, row in tokenizer.get_vocab().items() if row >= num_rows]
    num_padded = config.vocab_size - num_rows - len(added)
    if config.vocab_size > num_rows:
        main["shared.weight"] = main["shared.weight"][:num_rows].clone()
        config.vocab_size = num_rows
    return [
        f"{number} {what}{names}"
        for number, what, names in (
            (len(added), "added tokens", f": {shortened(added)}"),
            (num_padded, "rows that pad the embedding", ""),
        )
        if number > 0
    ]


def _num_sentinels(folder: Path) -> int:
    try:
        return int(read_json(folder / "tokenizer_config.json")["n_sentinel_tokens"])
    except (KeyError, TypeError):
        return 512  # as all published models have


def _settings(config: MetroT5Config, num_sentinels: int) -> dict[str, Any]:
    """Make settings for a model whose fairseq checkpoint is unknown."""
    start = config.decoder_start_token_id
    task = PRETRAINING_TASKS[0] if start != config.eos_token_id else "t5_prompt_finetuning"
    return {
        "model": _model_settings(config),
        "task": {"_name": task, "tokens_per_sample": num_sentinels},
        "criterion": {"_name": "label_smoothed_cross_entropy"},
    }


def _model_settings(config: MetroT5Config) -> dict[str, Any]:
    """Make fairseq's options of the main model as plain T5."""
    return {
        "_name": "transformer_t5_base_rpe",
        **{option: getattr(config, field) for option, field in MODEL_OPTIONS.items()},
        "decoder_embed_dim": config.d_model,
        "decoder_ffn_embed_dim": config.d_ff,
        "decoder_attention_heads": config.num_heads,
    }
