"""Settings of `metro pretrain` and `metro.pretrain`. Nothing heavy is imported here.

Options have fairseq's names, so that one configuration file serves both: it puts them in the groups
of fairseq's configuration (``task.mask_prob``), the command line and Python leave the groups out.
Each group is a class below; fairseq's own classes for them are made of these.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from metro.data.prepared_folder import shard_folders
from metro.sharding import ShardingSettings
from metro.utils.files import read_yaml
from metro.utils.messages import UserError
from metro.utils.settings import PRECISIONS, Settings, option

SHORTEN_METHODS = ("none", "truncate", "random_crop")
TASKS = {"t5_metro": "t5_metro_base_rpe", "t5": "transformer_t5_base_rpe"}
"""Task -> its architecture, where none is given."""
SIZES = {
    "encoder_embed_dim": (768, 1024),
    "encoder_ffn_embed_dim": (3072, 4096),
    "encoder_layers": (12, 24),
    "encoder_attention_heads": (12, 16),
    "encoder_rp_bins": (32, 128),
    "encoder_rp_max_dist": (128, 256),
    "generator_layers": (3, 6),
}
"""Option -> its default in base and large architectures."""
ARCHITECTURES = tuple(
    f"{name}{size}"
    for name in ("t5_metro", "transformer_t5")
    for size in ("", "_base_rpe", "_large_rpe")
)


@dataclass(kw_only=True)
class TaskOptions(Settings):
    """What an example is, of both tasks."""

    sample_break_mode: str = option(
        "none",
        "none: blocks of exactly tokens-per-sample; complete: whole sentences; "
        "complete_doc: of one document; eos: one sentence.",
        choices=("none", "complete", "complete_doc", "eos"),
        section="Examples",
    )
    tokens_per_sample: int = option(
        512, "Longest example, <s> included; also the number of sentinels.", least=3
    )
    mask_prob: float = option(0.15, "Share of tokens that are masked.")
    shorten_method: str = option(
        "none", "What to do with items longer than an example.", choices=SHORTEN_METHODS
    )
    shorten_data_split_list: str = option("", "Splits to shorten, as train,valid; empty: all.")
    mask_multiple_length: int | None = option(
        None, "METRO: neighbouring tokens masked together (1); T5: longest span (5).", least=1
    )
    leave_unmasked_prob: float = option(0.1, "METRO: share of masked tokens that stay.")
    random_token_prob: float = option(0.1, "METRO: share of masked tokens drawn at random.")
    empty_prob: float = option(0.1, "T5: share of mask-prob spent on empty spans.")


@dataclass(kw_only=True)
class ModelOptions(Settings):
    """Sizes, dropout and initial weights."""

    encoder_embed_dim: int | None = option(None, "Width.", least=1, section="Model")
    encoder_ffn_embed_dim: int | None = option(None, "Feed-forward width.", least=1)
    encoder_layers: int | None = option(None, "Encoder layers.", least=1)
    encoder_attention_heads: int | None = option(None, "Attention heads.", least=1)
    decoder_layers: int | None = option(None, "Default: as many as encoder layers.", least=1)
    dropout: float = option(0.1, "Dropout.", least=0, most=1)
    attention_dropout: float = option(0.1, "Of attention weights.", least=0, most=1)
    activation_dropout: float = option(0.0, "After the activation.", least=0, most=1)
    activation_fn: str = option("relu", "Of the feed-forward network.", choices=("relu", "gelu"))
    max_positions: int = option(1024, "Longest sequence.", least=3)
    encoder_rp_bins: int | None = option(None, "Relative position buckets.", least=2)
    encoder_rp_max_dist: int | None = option(
        None, "Distance from which all positions share one bucket.", least=1
    )
    init_token_std: float | None = option(None, "Std. of token embeddings; default: published.")
    init_position_std: float | None = option(None, "Std. of position tables; default: published.")
    init_neighbour_slope: float = option(0.0, "Each head starts at a neighbour, with this slope.")
    init_copy_gain: float = option(0.0, "Cross-attention starts by copying, with this gain.")
    generator_layers: int | None = option(
        None, "METRO: layers of the auxiliary model (published: 4, large 6).", least=1
    )
    generator_zero_dropout: bool = option(False, "METRO: no dropout in the auxiliary model.")
    generator_sample_mode: str = option(
        "train", "METRO: samples from the training pass, or one without dropout (eval)."
    )
    rtd_head: str = option("simple", "METRO: none, simple (linear) or roberta (dense first).")
    share_generator_discriminator_embed: str = option(
        "token", "METRO: shared with the main encoder: none, token, token_pos, token_pos_norm."
    )
    init_auxiliary_std: float | None = option(
        None, "METRO: std. of the auxiliary model's linear layers; default: 0.02."
    )


@dataclass(kw_only=True)
class CriterionOptions(Settings):
    """The losses."""

    label_smoothing: float = option(
        0.0, "Of the main model's loss.", least=0, most=1, section="Losses"
    )
    discriminator_loss_weight: float = option(1.0, "METRO: weight of the main model's loss.")
    masked_positions_only: str = option(
        "lm",
        "METRO: losses of masked positions only: none, lm (the main model's), both.",
        choices=("none", "lm", "both"),
    )
    rtd_loss_weight: float = option(50.0, "METRO: weight of replaced token detection.")
    rtd_only: bool = option(False, "METRO: leave out the main model's loss.")
    weighted_lm_loss: bool = option(
        False, "METRO: weight the main model's loss by the probability of replacement."
    )
    divide_by_mean_weight: bool = option(
        False, "METRO: divide the weighted loss by the mean weight."
    )


@dataclass(kw_only=True)
class DatasetOptions(Settings):
    """Batches and validation."""

    max_tokens: int = option(
        8192,
        "Tokens per process and micro-batch, padding included.",
        least=1,
        section="Batches",
    )
    batch_size: int | None = option(None, "At most so many examples of them.", least=1)
    required_batch_size_multiple: int = option(8, "Examples of a batch, times this.", least=1)
    num_workers: int = option(1, "Processes that prepare batches.", least=0)
    validate_interval_updates: int = option(
        0, "Validate every so many updates, beside each time it saves.", least=0
    )
    disable_validation: bool = option(False, "Train without validation.")


@dataclass(kw_only=True)
class OptimizationOptions(Settings):
    """Updates."""

    max_update: int = option(125_000, "Updates.", least=1)
    update_freq: int = option(1, "Micro-batches per update.", least=1)
    lr: float = option(4e-4, "Peak learning rate.", least=0)
    clip_norm: float = option(0.0, "Gradient norm clipping; 0: none.", least=0)
    skip_remainder_batch: bool = option(False, "Drop the last, smaller batches of an epoch.")


@dataclass(kw_only=True)
class OptimizerOptions(Settings):
    """Adam as fairseq has it."""

    adam_betas: str = option("(0.9,0.98)", "Two numbers.", section="Updates")
    adam_eps: float = option(1e-6, "Added to the root of the second moment.", least=0)
    weight_decay: float = option(0.01, "Weight decay, of all weights.", least=0)


@dataclass(kw_only=True)
class ScheduleOptions(Settings):
    """Learning rate over the updates."""

    warmup_updates: int = option(10_000, "Updates of linear warm-up, from 0.", least=0)
    total_num_update: int | None = option(
        None, "polynomial_decay ends here; default: max-update.", least=1
    )
    end_learning_rate: float = option(0.0, "Where polynomial_decay ends.", least=0)
    power: float = option(1.0, "Exponent of polynomial_decay.", least=0)


@dataclass(kw_only=True)
class CommonOptions(Settings):
    """Precision, logging and seed."""

    seed: int = option(
        1, "Of order, masks, samples and dropout.", least=0, most=2**31, section="Numbers"
    )
    fp16: bool = option(False, "Half precision, on GPUs.")
    bf16: bool = option(False, "bfloat16.")
    cpu: bool = option(False, "Train on the CPU although there is a GPU.")
    log_interval: int = option(100, "Log every so many updates.", least=1)


@dataclass(kw_only=True)
class CheckpointOptions(Settings):
    """Saving, and where to start."""

    save_interval_updates: int = option(
        1000, "Save every so many, and at the end.", least=0, section="Saving"
    )
    keep_interval_updates: int = option(2, "Newest checkpoints kept; -1: all.", least=-1)
    keep_interval_updates_pattern: int = option(
        -1, "Keep those of every so many updates too; -1: none.", least=-1
    )
    finetune_from_model: str | None = option(
        None, "Start from these weights: a fairseq .pt or a Hugging Face folder."
    )


GROUPS: dict[str, type[Settings]] = {
    "common": CommonOptions,
    "checkpoint": CheckpointOptions,
    "task": TaskOptions,
    "criterion": CriterionOptions,
    "dataset": DatasetOptions,
    "optimizer": OptimizerOptions,
    "lr_scheduler": ScheduleOptions,
    "optimization": OptimizationOptions,
    "model": ModelOptions,
}
"""Group of fairseq's configuration -> its options."""
OTHER_NAMES = {
    "task.data": "data",
    "checkpoint.save_dir": "output_dir",
    "task._name": "task",
    "model._name": "arch",
    "lr_scheduler._name": "lr_scheduler",
}
"""What a configuration calls an option -> its name here."""
FIXED = {
    "criterion._name": ("t5_metro", "label_smoothed_cross_entropy"),
    "optimizer._name": ("adam",),
    "task.mask_stdev": (0, 0.0),
    "model.no_generator": (False,),
}
"""What a configuration may say in one way only."""
OF_FAIRSEQ = {
    *("common.user_dir", "common.log_format", "common.use_plasma_view"),
    *("common.tensorboard_logdir", "checkpoint.no_epoch_checkpoints"),
    *("criterion.report_accuracy", "dataset.ignore_unused_valid_subsets"),
    "dataset.skip_invalid_size_inputs_valid_test",
}
"""What a configuration tells fairseq and `metro pretrain` does anyway."""


@dataclass(kw_only=True)
class PretrainingSettings(
    ModelOptions,
    OptimizationOptions,
    ScheduleOptions,
    OptimizerOptions,
    DatasetOptions,
    CriterionOptions,
    TaskOptions,
    CheckpointOptions,
    CommonOptions,
    ShardingSettings,
):
    """Options of a pretraining run."""

    CONFIGS = Path(__file__).parent / "configs"

    data: str = option(help="Folder of metro prepare-text, or several, joined by colons.")
    output_dir: str = option(help="Where checkpoints, logs and the model go.")
    task: str = option("t5_metro", "METRO, or span corruption (t5).", choices=tuple(TASKS))
    arch: str | None = option(
        None,
        "Sizes where options leave them out: t5_metro_large_rpe, transformer_t5_large_rpe, ...",
        choices=ARCHITECTURES,
        metavar="NAME",
        section="Run",
    )
    lr_scheduler: str = option(
        "polynomial_decay", "After the warm-up.", choices=("polynomial_decay", "inverse_sqrt")
    )
    keep_auxiliary: bool = option(False, "METRO: keep auxiliary model and RTD head, too.")
    precision: str = option(
        "auto", "auto: as fp16 or bf16 say, else bf16 where that is fast.", choices=PRECISIONS
    )
    checkpoint_activations: bool = option(False, "Recompute activations: less memory, slower.")
    compile: bool = option(False, "Compile the model with torch.compile.")
    resume: str = option("auto", "auto: from the last checkpoint of output-dir; never; or a path.")
    report_to: str = option(
        "auto", "auto (TensorBoard where it is installed), tensorboard, wandb, none, ..."
    )

    def check(self) -> None:
        """Refuse values that do not fit together."""
        self.check_sharding()
        check_shares(self, "mask_prob")
        check_shares(self, "leave_unmasked_prob", "random_token_prob")
        check_shares(self, "empty_prob")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"adam_betas is {self.adam_betas}; give two, such as (0.9,0.98)")
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}; use more than 0")
        if self.fp16 and self.bf16:
            raise UserError("fp16 and bf16 are both true; choose one")
        if self.arch and self.arch.startswith("t5_metro") != (self.task == "t5_metro"):
            raise UserError(f"arch {self.arch} is not of the task {self.task}; leave it out")
        if self.tokens_per_sample > self.max_positions:
            raise UserError(
                f"tokens_per_sample {self.tokens_per_sample} is larger than the model's "
                f"max_positions {self.max_positions}; lower the first or raise the second"
            )

    @property
    def is_metro(self) -> bool:
        """METRO's task, not T5's."""
        return self.task == "t5_metro"

    @property
    def betas(self) -> tuple[float, ...]:
        """`adam_betas` as numbers."""
        try:
            return tuple(map(float, re.findall(r"[^\s,()\[\]]+", self.adam_betas)))
        except ValueError:
            raise UserError(f"adam_betas is {self.adam_betas!r}; give two numbers") from None

    @cached_property
    def folders(self) -> list[Path]:
        """The shards of the data."""
        return shard_folders(self.data)

    def resolved(self) -> "PretrainingSettings":
        """Return the settings with the values that task and architecture decide."""
        values: dict[str, Any] = {"arch": self.arch or TASKS[self.task]}
        for name, (base, large) in SIZES.items():
            given, default = getattr(self, name), large if "large" in values["arch"] else base
            values[name] = default if given is None else given
        values["decoder_layers"] = self.decoder_layers or values["encoder_layers"]
        values["total_num_update"] = self.total_num_update or self.max_update
        values["mask_multiple_length"] = self.mask_multiple_length or (1 if self.is_metro else 5)
        return replace(self, **values)

    def grouped(self) -> dict[str, dict[str, Any]]:
        """Return the values in fairseq's groups, as a checkpoint of fairseq has them."""
        groups: dict[str, dict[str, Any]] = {
            group: {name: getattr(self, name) for name in options.names()}
            for group, options in GROUPS.items()
        }
        for place, name in OTHER_NAMES.items():
            group, _, key = place.partition(".")
            groups[group][key] = getattr(self, name)
        groups["criterion"]["_name"] = (
            "t5_metro" if self.is_metro else "label_smoothed_cross_entropy"
        )
        groups["optimizer"]["_name"] = "adam"
        for name in ("lr", "update_freq"):
            groups["optimization"][name] = [groups["optimization"][name]]
        for name in ("embed_dim", "ffn_embed_dim", "attention_heads"):
            groups["model"][f"decoder_{name}"] = groups["model"][f"encoder_{name}"]
        return groups

    @classmethod
    def read(cls, config: str | Path) -> dict[str, Any]:
        """Options from a YAML file, in fairseq's groups or without them."""
        path = cls.find_config(config)
        content = read_yaml(path)
        if not isinstance(content, dict) or not any(isinstance(v, dict) for v in content.values()):
            return super().read(config)
        return cls.by_name(ungrouped(content, str(path)), str(path))


def ungrouped(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take the options out of the groups of fairseq's configuration.

    Raises:
        UserError: an option says what `metro pretrain` does not do.
    """
    options: dict[str, Any] = {}
    for group, values in content.items():
        if group == "hydra":
            continue
        for key, value in values.items() if isinstance(values, dict) else ():
            place = f"{group}.{key}"
            if place in FIXED and value not in FIXED[place]:
                allowed = ", ".join(map(str, FIXED[place]))
                raise UserError(f"{where}: {place} is {value!r}; metro pretrain has {allowed}")
            if place in FIXED or place in OF_FAIRSEQ or value == "???":
                continue
            if key in ("lr", "update_freq") and isinstance(value, list):
                if len(value) != 1:
                    raise UserError(f"{where}: {place} is {value}; metro pretrain has one value")
                value = value[0]
            if key in ("rtd_head", "share_generator_discriminator_embed"):
                value = str(value).lower()  # published files give booleans
            options[OTHER_NAMES.get(place, str(key))] = value
        if not isinstance(values, dict):
            options[group] = values
    return options


def check_shares(options: Any, *names: str) -> None:
    """Refuse options that are not a share, or that make more than a whole together."""
    values = [getattr(options, name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not 0 <= value <= 1:  # also NaN
            raise UserError(f"{name} is {value}; it is a share: use 0 to 1")
    if sum(values) > 1:
        raise UserError(f"{' + '.join(names)} is {sum(values):g}; together they are at most 1")
