"""Model `transformer_t5` and its architectures: METRO's main model alone, for T5 pretraining."""

from dataclasses import dataclass

from fairseq.models import BaseFairseqModel, register_model

from fairseq_plugins.models._options import (
    LARGE,
    OF_METRO,
    T5ModelConfig,
    check_vocabulary,
    metro_t5_config,
)
from fairseq_plugins.option import options_of
from metro.finetuning.losses import LossOptions, batch_loss
from metro.fusion import fuse
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.models.fairseq_names import is_fairseq_state, rename_fairseq_state
from metro.pretraining.building import initialization
from metro.pretraining.initialization import initialize
from metro.pretraining.settings import ModelOptions


@dataclass
@options_of(ModelOptions, without=OF_METRO, **LARGE)
class T5LargeModelConfig(T5ModelConfig):
    """Large size."""


@register_model("transformer_t5", dataclass=T5ModelConfig)
class TransformerT5Model(BaseFairseqModel):
    """Holds `MetroT5ForConditionalGeneration` as `model`; returns logits for fairseq's criteria."""

    def __init__(self, model: MetroT5ForConditionalGeneration):
        super().__init__()
        self.model = model

    @classmethod
    def build_model(cls, cfg: T5ModelConfig, task):
        config = metro_t5_config(cfg, task.source_dictionary)
        # <sen000> in pretraining, </s> in prompt finetuning
        config.decoder_start_token_id = getattr(
            task, "decoder_start", config.decoder_start_token_id
        )
        model = MetroT5ForConditionalGeneration(config)
        return cls(fuse(initialize(model, initialization(cfg))))

    def forward(
        self,
        src_tokens,
        src_lengths,
        prev_output_tokens=None,
        has_padding: bool | None = None,
        wrong_source_ids=None,
        target_ids=None,
        loss_options: LossOptions | None = None,
    ):
        """Logits (B, T, V), or with `loss_options` the sums of `metro.finetuning.losses`.

        Without padding attention needs no mask.
        """
        if loss_options is not None:
            return batch_loss(
                self.model,
                loss_options,
                src_tokens,
                target_ids,
                wrong_source_ids,
                num_items=1.0,
            )
        mask = None if has_padding is False else src_tokens.ne(self.model.config.pad_token_id)
        output = self.model(
            input_ids=src_tokens,
            attention_mask=mask,
            decoder_input_ids=prev_output_tokens,
            use_cache=False,
        )
        return output.logits

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> None:
        """Take the main model out of the original's checkpoints, and out of METRO's."""
        state = rename_fairseq_state(state_dict) if is_fairseq_state(state_dict) else state_dict
        state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
        if any(key.startswith("main.") for key in state):
            main = {key: tensor for key, tensor in state.items() if key.startswith("main.")}
            state = {key.removeprefix("main."): tensor for key, tensor in main.items()}
        state = {f"model.{key}": tensor for key, tensor in state.items()}
        state_dict.clear()
        state_dict.update(state)
        check_vocabulary(state_dict, self.model.config)

    def max_positions(self) -> int:
        return self.model.config.max_positions


@register_model("transformer_t5_base_rpe", dataclass=T5ModelConfig)
class TransformerT5BaseModel(TransformerT5Model):
    pass


@register_model("transformer_t5_large_rpe", dataclass=T5LargeModelConfig)
class TransformerT5LargeModel(TransformerT5Model):
    pass
