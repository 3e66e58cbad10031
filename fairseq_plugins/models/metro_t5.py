"""Model `t5_metro` and its architectures: METRO's main model, auxiliary model and RTD head."""

from dataclasses import dataclass, fields
from typing import Optional  # fairseq reads Optional[...], not X | None

from fairseq.models import BaseFairseqModel, register_model

from fairseq_plugins.models._options import (
    LargeSizes,
    T5ModelConfig,
    check_vocabulary,
    initialization,
    metro_t5_config,
)
from fairseq_plugins.option import config_option
from metro.fusion import fuse
from metro.models.fairseq_names import is_fairseq_state, rename_fairseq_state
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.initialization import initialize
from metro.pretraining.losses import MetroLosses, MetroObjective
from metro.pretraining.model import MetroPretrainingModel
from metro.utils.messages import UserError


@dataclass
class MetroModelConfig(T5ModelConfig):
    """Base size with METRO's auxiliary model."""

    generator_layers: int = config_option(
        3,
        "layers of the auxiliary model; the published configurations of base models "
        "set 4, those of large models 6",
    )
    generator_zero_dropout: bool = config_option(
        False, "no dropout in the auxiliary model, as in the published configurations"
    )
    generator_sample_mode: str = config_option(
        "train", "train: sample from the training pass; eval: from one without dropout"
    )
    rtd_head: str = config_option("simple", "none, simple (linear) or roberta (dense first)")
    share_generator_discriminator_embed: str = config_option(
        "token",
        "what the auxiliary model shares with the main encoder: none, token, token_pos "
        "or token_pos_norm",
    )
    init_auxiliary_std: Optional[float] = config_option(
        None, "standard deviation of the auxiliary model's initial linear layers; default: 0.02"
    )
    no_generator: bool = config_option(
        False, "of the published code, kept so that its commands parse; true is refused"
    )


@dataclass
class MetroLargeModelConfig(LargeSizes, MetroModelConfig):
    """Large size."""

    generator_layers: int = 6


def auxiliary_config(cfg: MetroModelConfig) -> MetroPretrainingConfig:
    """METRO's own options as the library takes them."""
    if cfg.no_generator:
        raise UserError(
            "no_generator is true, but METRO learns from the auxiliary model's replacements; for "
            "pretraining without one use task t5 with model transformer_t5_base_rpe"
        )
    options = {part.name: getattr(cfg, part.name) for part in fields(MetroModelConfig)}
    return MetroPretrainingConfig.from_options(options, cfg.generator_layers)


@register_model("t5_metro", dataclass=MetroModelConfig)
class MetroT5Model(BaseFairseqModel):
    """Holds `MetroPretrainingModel` as `model`."""

    def __init__(self, model: MetroPretrainingModel):
        super().__init__()
        self.model = model

    @classmethod
    def build_model(cls, cfg: MetroModelConfig, task):
        config = metro_t5_config(cfg, task.source_dictionary)
        model = MetroPretrainingModel(config, auxiliary_config(cfg))
        return cls(fuse(initialize(model, initialization(cfg))))

    def forward(
        self,
        src_tokens,
        src_lengths,
        prev_output_tokens,
        original_ids,
        is_masked,
        sampling_seed,
        objective: MetroObjective,
        max_masked: int | None = None,
        corrupted_ids=None,
        has_padding: bool | None = None,
    ) -> MetroLosses:
        if objective.rtd_weight > 0 and self.model.rtd_head is None:
            raise UserError(
                f"rtd_loss_weight is {objective.rtd_weight} but the model has rtd_head none; set "
                "model.rtd_head=simple (or roberta), or criterion.rtd_loss_weight=0"
            )
        if self.training and objective.rtd_weight == 0 and self.model.rtd_head is not None:
            # The head would get no gradient, which DistributedDataParallel takes for an error.
            raise UserError(
                "rtd_loss_weight is 0 but the model has an RTD head, which would not be trained; "
                "set model.rtd_head=none"
            )
        return self.model(
            src_tokens,
            original_ids,
            is_masked,
            prev_output_tokens,
            sampling_seed,
            objective,
            corrupted_ids=corrupted_ids,
            max_masked=max_masked,
            has_padding=has_padding,
        )

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> None:
        """Rename checkpoints of the original; refuse those of another vocabulary."""
        if is_fairseq_state(state_dict):
            renamed = rename_fairseq_state(state_dict)
            state_dict.clear()
            state_dict.update({f"model.{key}": tensor for key, tensor in renamed.items()})
        check_vocabulary(state_dict, self.model.config)

    def max_positions(self) -> int:
        return self.model.config.max_positions


# An architecture is a model of its own, with its sizes as the defaults of its options: fairseq's
# functions for architectures (`register_model_architecture`) are ignored by fairseq-hydra-train.


@register_model("t5_metro_base_rpe", dataclass=MetroModelConfig)
class MetroT5BaseModel(MetroT5Model):
    pass


@register_model("t5_metro_large_rpe", dataclass=MetroLargeModelConfig)
class MetroT5LargeModel(MetroT5Model):
    pass
