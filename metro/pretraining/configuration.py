"""Settings of what METRO pretraining adds to the main model: auxiliary model and RTD head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metro.utils.messages import UserError

RTD_HEADS = ("none", "simple", "roberta")
SHARED_EMBEDDINGS = ("none", "token", "token_pos", "token_pos_norm")
SAMPLE_MODES = ("train", "eval")

MODEL_OPTIONS = {
    "encoder_embed_dim": "d_model",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_embed_dim": "d_ff",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "dropout": "dropout_rate",
    "attention_dropout": "attention_dropout_rate",
    "activation_dropout": "activation_dropout_rate",
    "activation_fn": "feed_forward_proj",
    "max_positions": "max_positions",
    "encoder_rp_bins": "relative_attention_num_buckets",
    "encoder_rp_max_dist": "relative_attention_max_distance",
}
"""Option of fairseq's models -> field of ``MetroT5Config``."""


@dataclass(frozen=True)
class MetroPretrainingConfig:
    """Configuration of the auxiliary model and the head of replaced token detection (RTD).

    Raises:
        UserError: an option outside its valid values, naming both.
    """

    auxiliary_layers: int = 4
    """Layers of the auxiliary model: 4 for base and base++, 6 for large++."""
    zero_dropout: bool = True
    """No dropout in the auxiliary model; otherwise the main model's rates."""
    sample_mode: str = "train"
    """Samples come from the training pass (``train``), or from one without dropout (``eval``)."""
    rtd_head: str = "simple"
    """RTD head on the main encoder: ``none``, ``simple`` (linear) or ``roberta`` (dense first)."""
    share: str = "token"
    """Shared by the auxiliary model and the main encoder: ``none``, ``token`` embeddings,
    ``token_pos`` (also positions) or ``token_pos_norm`` (also the first LayerNorm)."""

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], auxiliary_layers: int
    ) -> "MetroPretrainingConfig":
        """Read the options of fairseq's model ``t5_metro``, missing ones as published.

        Published files also give choices as booleans (``rtd_head: true``).
        """

        def choice(name: str, if_true: str) -> str:
            text = str(options.get(name, if_true)).lower()
            return {"true": if_true, "false": "none"}.get(text, text)

        return cls(
            auxiliary_layers,
            zero_dropout=bool(options.get("generator_zero_dropout", False)),
            sample_mode=str(options.get("generator_sample_mode") or "train"),
            rtd_head=choice("rtd_head", "simple"),
            share=choice("share_generator_discriminator_embed", "token"),
        )

    def __post_init__(self):
        for name, valid in (
            ("rtd_head", RTD_HEADS),
            ("share", SHARED_EMBEDDINGS),
            ("sample_mode", SAMPLE_MODES),
        ):
            if getattr(self, name) not in valid:
                raise UserError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(valid)}")
