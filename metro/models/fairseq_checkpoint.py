"""Read a fairseq checkpoint, of the original METRO-T0 code or of this project.

Parameter names of the two are in ``fairseq_names``. The settings (``cfg``) have the same names in
both, but the original's METRO checkpoints state ``encoder_layers`` and the dropout rates of the
auxiliary model in place of the main model's; there, depths are read from the weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.modeling.text_metro_t5 import BOS_ID, EOS_ID, PAD_ID
from metro.models.fairseq_names import (
    MODEL_OPTIONS,
    is_fairseq_state,
    rename_fairseq_state,
    rename_plugin_state,
)
from metro.models.reading import (
    check_weights,
    expected_shapes,
    load_tensors_and_settings,
    read_tensors,
)
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.model import MetroPretrainingModel
from metro.utils.files import read_json
from metro.utils.messages import UserError, shortened

TIED = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)
"""Names of the main model's single embedding matrix."""

PRETRAINING_TASKS = ("t5", "t5_metro")
PRETRAINING_WEIGHTS, TRAINING = "pretraining.safetensors", "training.json"
"""Files of an export that has kept auxiliary model and RTD head, and how it was trained."""


@dataclass
class FairseqCheckpoint:
    """Content of a checkpoint, checked to be complete."""

    path: Path
    names: str
    """Naming scheme of the file's parameters: ``original`` or ``metro``."""
    settings: dict[str, Any]
    """``cfg`` as plain values."""
    main: dict[str, torch.Tensor]
    """The main model, all its names, as ``MetroT5ForConditionalGeneration`` has them."""
    extra: dict[str, torch.Tensor]
    """``auxiliary.*`` and ``rtd_head.*`` of ``MetroPretrainingModel``; empty for plain T5."""
    config: MetroT5Config
    auxiliary: MetroPretrainingConfig | None
    """The auxiliary model and the RTD head; ``None`` for plain T5."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """``optimizer_history``: one entry per training run, with its number of updates."""
    losses: dict[str, float] = field(default_factory=dict)
    """Validation losses in the file: ``valid`` (the last) and ``best``."""
    notes: list[str] = field(default_factory=list)
    """Caveats for the user."""

    @property
    def task(self) -> dict[str, Any]:
        return self.settings.get("task") or {}

    @property
    def is_pretrained_only(self) -> bool:
        """Not finetuned: its decoder starts with ``<sen000>`` instead of ``</s>``."""
        return self.task.get("_name") in PRETRAINING_TASKS

    @property
    def first_sentinel(self) -> int | None:
        """Id of ``<sen000>``, if the settings state the number of sentinels."""
        count = self.task.get("tokens_per_sample")
        return self.config.vocab_size - count if isinstance(count, int) else None


def read_checkpoint(path: str | Path) -> FairseqCheckpoint:
    """Read a fairseq ``.pt`` file and check it.

    Raises:
        UserError: no such file; it holds code, is damaged or is not a checkpoint; or tensors are
            missing, unexpected or of another shape than the settings say (all are listed).
    """
    path = Path(path)
    content = load_tensors_and_settings(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        remedy = "use the .pt file that fairseq wrote"
        if isinstance(content, Mapping) and any("embed" in str(name) for name in content):
            remedy = "it holds bare weights: give the Hugging Face folder it is in instead"
        raise UserError(f"{path} is not a fairseq checkpoint (it has no `model`): {remedy}")
    settings = _settings(content, path)
    state = dict(content["model"])
    if strange := [name for name, value in state.items() if not _is_parameter(name, value)]:
        raise UserError(
            f"the `model` of {path} holds other things than dense floating point tensors: "
            f"{shortened(map(repr, strange))}; use the .pt file that fairseq wrote"
        )
    names = "original" if is_fairseq_state(state) else "metro"
    state = rename_fairseq_state(state) if names == "original" else rename_plugin_state(state)
    main = {n.removeprefix("main."): t for n, t in state.items() if n.startswith("main.")}
    extra = {name: tensor for name, tensor in state.items() if not name.startswith("main.")}
    is_metro = bool(extra) or model_name(settings).startswith("t5_metro")
    auxiliary = auxiliary_config(settings, extra, path) if is_metro else None
    checkpoint = FairseqCheckpoint(
        path,
        names,
        settings,
        main,
        extra,
        config=model_config(settings, main, path, trust_depth=names == "metro" or not is_metro),
        auxiliary=auxiliary,
        history=_history(content.get("optimizer_history")),
        losses=_losses(content.get("extra_state")),
    )
    _check(checkpoint)
    if auxiliary is not None and names == "original" and auxiliary.zero_dropout:
        checkpoint.notes.append(
            "the original's METRO checkpoints state the auxiliary model's dropout rates instead of "
            f"the main model's: dropout_rate is {checkpoint.config.dropout_rate} here; the "
            "published configurations train with 0.1"
        )
    if checkpoint.is_pretrained_only and checkpoint.first_sentinel is not None:
        checkpoint.config.decoder_start_token_id = checkpoint.first_sentinel
    return checkpoint


def _settings(content: Mapping, path: Path) -> dict[str, dict[str, Any]]:
    """Read the groups of settings, ``model`` among them, as plain values."""
    try:
        settings = plain(content.get("cfg"))
        args = None if settings else plain(content.get("args"))
        if isinstance(args, dict):  # before fairseq had configurations, one namespace held all
            settings = {"model": args, "task": {**args, "_name": args.get("task")}}
    except RecursionError:
        raise UserError(f"{path} holds settings that contain themselves; it is damaged") from None
    groups = settings.items() if isinstance(settings, dict) else ()
    settings = {name: group for name, group in groups if isinstance(group, dict)}
    if not settings.get("model"):
        raise UserError(
            f"{path} holds no settings (cfg.model), so the sizes of its model are unknown; use the "
            "file as fairseq wrote it"
        )
    return settings


def _is_parameter(name, value) -> bool:
    return (
        isinstance(name, str)
        and torch.is_tensor(value)
        and value.is_floating_point()
        and value.layout == torch.strided
    )


def plain(value):
    """Convert namespaces and omegaconf containers to dictionaries and lists, at any depth."""
    if hasattr(value, "_content") and hasattr(value, "_metadata"):  # omegaconf, perhaps unresolved
        from omegaconf import OmegaConf

        value = OmegaConf.to_container(value, resolve=False)
    elif type(value).__name__ == "Namespace":
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def model_name(settings: dict) -> str:
    model = settings["model"]
    return str(model.get("_name") or model.get("arch") or "")


def model_config(
    settings: dict, main: Mapping[str, torch.Tensor], path: Path, trust_depth: bool
) -> MetroT5Config:
    """Build the configuration: sizes from the settings, depth and vocabulary from the weights."""
    cfg, shapes = settings["model"], {name: tuple(t.shape) for name, t in main.items()}

    def depth(stack: str) -> int:
        layers = [re.match(rf"{stack}\.block\.(\d+)\.", name) for name in main]
        return max((int(layer[1]) + 1 for layer in layers if layer), default=0)

    def stated(name: str, default=None):
        value = cfg.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{path} does not say cfg.model.{name}; is this another model?")
        return value

    def size(name: str, default=None) -> int:
        value = stated(name, default)
        if type(value) is not int or value < 1:
            raise UserError(
                f"{path} says cfg.model.{name} is {value!r}, which must be a whole number of at "
                "least 1; use the file as fairseq wrote it"
            )
        return value

    def rate(name: str, default: Any) -> float:
        value = stated(name, default)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise UserError(
                f"{path} says cfg.model.{name} is {value!r}, which must be a number from 0 to 1; "
                "use the file as fairseq wrote it"
            )
        return float(value)

    embedding = shapes.get("shared.weight") or shapes.get("encoder.embed_tokens.weight")
    if not embedding or len(embedding) != 2:
        raise UserError(f"{path} holds no token embedding (encoder.embed_tokens.weight)")
    encoder_layers = size("encoder_layers") if trust_depth else depth("encoder")
    dropout = rate("dropout", 0.1)
    options: dict[str, Any] = {
        "encoder_layers": encoder_layers,
        "decoder_layers": size("decoder_layers", encoder_layers),
        "dropout": dropout,
        "attention_dropout": rate("attention_dropout", dropout),
        "activation_dropout": rate("activation_dropout", 0.0),
        "activation_fn": str(stated("activation_fn")),
    }
    options |= {name: size(name) for name in MODEL_OPTIONS if name not in options}
    fields: dict[str, Any] = dict(
        **{field: options[name] for name, field in MODEL_OPTIONS.items()},
        vocab_size=embedding[0],
        d_kv=options["encoder_embed_dim"] // options["encoder_attention_heads"],
        layer_norm_epsilon=1e-5,  # fairseq has no option for it
        bos_token_id=BOS_ID,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=EOS_ID,
        architectures=["MetroT5ForConditionalGeneration"],
        dtype=main["decoder.first_layer_norm.weight"].dtype
        if "decoder.first_layer_norm.weight" in main
        else None,
    )
    try:
        return MetroT5Config(**fields)
    except ValueError as error:
        raise UserError(f"{path} has settings (cfg.model) of no model: {error}") from None


def auxiliary_config(settings: dict, extra: Mapping, path: Path) -> MetroPretrainingConfig:
    """Build the configuration of auxiliary model and RTD head, its depth from the weights."""
    layers = [re.match(r"auxiliary\.encoder\.block\.(\d+)\.", name) for name in extra]
    depth = max((int(layer[1]) + 1 for layer in layers if layer), default=0)
    try:
        return MetroPretrainingConfig.from_options(settings["model"], depth)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def untied(main: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keep the main model's embedding matrix under the one name ``shared.weight``."""
    return {name: tensor for name, tensor in main.items() if name not in TIED[1:]}


def generation_config(checkpoint: FairseqCheckpoint) -> GenerationConfig:
    """Build the generation settings: start and end tokens of the model's targets.

    After finetuning both are ``</s>``. Targets of pretraining start with ``<sen000>``; those of
    span corruption also end with it, METRO's end with ``</s>``.
    """
    config = checkpoint.config
    end = [EOS_ID]
    if checkpoint.is_pretrained_only and checkpoint.first_sentinel is not None:
        end = [checkpoint.first_sentinel]
        end += [EOS_ID] if checkpoint.task["_name"] == "t5_metro" else []
    return GenerationConfig(
        bos_token_id=BOS_ID,
        pad_token_id=PAD_ID,
        eos_token_id=end[0] if len(end) == 1 else end,
        decoder_start_token_id=config.decoder_start_token_id,
    )


def shared_with_main(auxiliary: MetroPretrainingConfig) -> dict[str, str]:
    """Map the auxiliary model's names of tensors it shares to the main model's names."""
    shared = auxiliary.share.split("_")
    names = {
        "token": ["embed_tokens.weight"],
        "pos": ["pos_embed.weight"],
        "norm": ["first_layer_norm.weight", "first_layer_norm.bias"],
    }
    return {
        f"auxiliary.encoder.{name}": f"encoder.{name}"
        for part in shared
        for name in names.get(part, [])
    }


def kept_pretraining_weights(
    folder: Path, settings: dict, config: MetroT5Config
) -> tuple[dict[str, torch.Tensor], MetroPretrainingConfig | None]:
    """Read and check auxiliary model and RTD head, if the export has kept them."""
    path = folder / PRETRAINING_WEIGHTS
    if not path.is_file():
        return {}, None
    tensors = read_tensors(path)
    auxiliary = auxiliary_config(settings, tensors, folder / TRAINING)
    shapes = expected_shapes(MetroPretrainingModel, config, auxiliary)
    shared = shared_with_main(auxiliary)
    expected = {
        name: shape
        for name, shape in shapes.items()
        if not name.startswith("main.") and name not in shared
    }
    check_weights(tensors, expected, str(path), "the auxiliary model that training.json describes")
    return tensors, auxiliary


def read_training(folder: Path) -> dict[str, Any]:
    """Read how an export was trained; empty where it does not say."""
    path = folder / TRAINING
    training = read_json(path)
    if training is None:
        return {}
    settings = training.get("settings") if isinstance(training, dict) else None
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(name), dict) for name in ("model", "task")
    ):
        raise UserError(
            f"{path} has no settings.model and settings.task; copy it again, or remove it"
        )
    return training


def _check(checkpoint: FairseqCheckpoint) -> None:
    """Check completeness, shapes, and that shared tensors are equal under all their names."""
    source, config = str(checkpoint.path), checkpoint.config
    if checkpoint.auxiliary is None:
        expected = expected_shapes(MetroT5ForConditionalGeneration, config)
    else:
        shapes = expected_shapes(MetroPretrainingModel, config, checkpoint.auxiliary)
        expected = {name.removeprefix("main."): shape for name, shape in shapes.items()}
    state = {**checkpoint.main, **checkpoint.extra}
    check_weights(state, expected, source, "the model that its settings (cfg.model) describe")
    same = {name: "shared.weight" for name in TIED[1:]}
    if checkpoint.auxiliary is not None:
        same |= shared_with_main(checkpoint.auxiliary)
    different = [
        f"{name} and {main}" for name, main in same.items() if not _equal(state[name], state[main])
    ]
    if different:
        raise UserError(
            f"{source} holds two different tensors where the model has one: "
            f"{', '.join(different)}; the file is inconsistent"
        )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _history(entries) -> list[dict[str, Any]]:
    entries = plain(entries)
    entries = entries if isinstance(entries, list) else []
    return [entry for entry in entries if isinstance(entry, dict)]


def _losses(extra_state) -> dict[str, float]:
    if not isinstance(extra_state, Mapping):
        return {}
    stated = {"valid": extra_state.get("val_loss"), "best": extra_state.get("best")}
    return {name: float(loss) for name, loss in stated.items() if isinstance(loss, int | float)}
