"""A fresh model from options under fairseq's names."""

from dataclasses import fields
from typing import Any

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.modeling.text_metro_t5 import BOS_ID, EOS_ID, PAD_ID
from metro.pretraining.configuration import MODEL_OPTIONS, MetroPretrainingConfig
from metro.pretraining.initialization import Initialization, initialize
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel, T5PretrainingModel
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import UserError


def main_config(options: Any, vocab_size: int, first_sentinel: int) -> MetroT5Config:
    """Build the main model's configuration; refuse what it cannot express.

    Args:
        options: those of the model, by their names.
        vocab_size: with sentinels.
        first_sentinel: id of ``<sen000>``.
    """
    for name in ("embed_dim", "ffn_embed_dim", "attention_heads"):
        encoder = getattr(options, f"encoder_{name}")
        decoder = getattr(options, f"decoder_{name}", None)
        if decoder is not None and decoder != encoder:
            raise UserError(
                f"encoder_{name} is {encoder} but decoder_{name} is {decoder}; METRO-T5 has one "
                f"width for both: make them equal or leave decoder_{name} out"
            )
    if options.encoder_embed_dim % options.encoder_attention_heads:
        raise UserError(
            f"encoder_embed_dim {options.encoder_embed_dim} is not divisible by "
            f"encoder_attention_heads {options.encoder_attention_heads}"
        )
    sizes = {field: getattr(options, name) for name, field in MODEL_OPTIONS.items()}
    sizes["num_decoder_layers"] = options.decoder_layers or options.encoder_layers
    return MetroT5Config(
        **sizes,
        vocab_size=vocab_size,
        d_kv=options.encoder_embed_dim // options.encoder_attention_heads,
        layer_norm_epsilon=1e-5,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=first_sentinel,
    )


def initialization(options: Any) -> Initialization:
    """Options of the initial weights as the library takes them."""
    names = [field.name for field in fields(Initialization)]
    given = {name: getattr(options, f"init_{name}", None) for name in names}
    return Initialization(**{name: std for name, std in given.items() if std is not None})


def objective(options: Any) -> MetroObjective:
    """Options of METRO's criterion as the library takes them."""
    return MetroObjective(
        corrective_lm_weight=options.discriminator_loss_weight,
        rtd_weight=options.rtd_loss_weight,
        positions=options.masked_positions_only,
        label_smoothing=options.label_smoothing,
        weighted_lm=options.weighted_lm_loss,
        divide_by_mean_weight=options.divide_by_mean_weight,
        rtd_only=options.rtd_only,
    )


def check_rtd_head(objective: MetroObjective, model: MetroPretrainingModel) -> None:
    """Refuse an objective and a head of which one needs the other."""
    if objective.rtd_weight > 0 and model.rtd_head is None:
        raise UserError(
            f"rtd_loss_weight is {objective.rtd_weight} but the model has rtd_head none; set "
            "model.rtd_head=simple (or roberta), or criterion.rtd_loss_weight=0"
        )
    if model.training and objective.rtd_weight == 0 and model.rtd_head is not None:
        # The head would get no gradient, which DistributedDataParallel takes for an error.
        raise UserError(
            "rtd_loss_weight is 0 but the model has an RTD head, which would not be trained; "
            "set model.rtd_head=none"
        )


def build_model(
    settings: PretrainingSettings, first_sentinel: int
) -> MetroPretrainingModel | T5PretrainingModel:
    """Build what the settings train, with fresh weights."""
    config = main_config(settings, first_sentinel + settings.tokens_per_sample, first_sentinel)
    start = initialization(settings)
    if not settings.is_metro:
        return T5PretrainingModel(initialize(MetroT5ForConditionalGeneration(config), start))
    assert settings.generator_layers is not None
    options = {name: getattr(settings, name) for name in settings.names()}
    auxiliary = MetroPretrainingConfig.from_options(options, settings.generator_layers)
    model = initialize(MetroPretrainingModel(config, auxiliary), start)
    check_rtd_head(objective(settings), model)
    return model
