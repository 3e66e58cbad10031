"""Model `t5_metro` and its architectures: METRO's main model, auxiliary model and RTD head."""

from dataclasses import dataclass, fields

from fairseq.models import BaseFairseqModel, register_model

from fairseq_plugins.models._options import (
    BASE,
    LARGE,
    T5ModelConfig,
    check_vocabulary,
    metro_t5_config,
)
from fairseq_plugins.option import config_option, options_of
from metro.fusion import fuse
from metro.models.fairseq_names import is_fairseq_state, rename_fairseq_state
from metro.pretraining.building import check_rtd_head, initialization
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.initialization import initialize
from metro.pretraining.losses import MetroLosses, MetroObjective
from metro.pretraining.model import MetroPretrainingModel
from metro.pretraining.settings import ModelOptions
from metro.utils.messages import UserError


@dataclass
@options_of(ModelOptions, (), **BASE)
class MetroModelConfig(T5ModelConfig):
    """Base size with METRO's auxiliary model."""

    no_generator: bool = config_option(
        False, "of the published code, kept so that its commands parse; true is refused"
    )


@dataclass
@options_of(ModelOptions, (), **LARGE)
class MetroLargeModelConfig(MetroModelConfig):
    """Large size."""


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
        check_rtd_head(objective, self.model)
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
