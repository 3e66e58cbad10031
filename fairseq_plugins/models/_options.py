"""Model options under fairseq's names, and their one translation into `MetroT5Config`."""

from dataclasses import dataclass, fields
from typing import Optional  # fairseq reads Optional[...], not X | None

from fairseq.dataclass import FairseqDataclass

from fairseq_plugins.option import config_option
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.models.fairseq_names import MODEL_OPTIONS
from metro.pretraining.initialization import Initialization
from metro.utils.messages import UserError


@dataclass
class T5ModelConfig(FairseqDataclass):
    """Base size. `decoder_*` options that are left out follow `encoder_*`."""

    encoder_embed_dim: int = config_option(768, "width")
    encoder_ffn_embed_dim: int = config_option(3072, "feed-forward width")
    encoder_layers: int = config_option(12, "encoder layers")
    encoder_attention_heads: int = config_option(12, "attention heads")
    decoder_embed_dim: Optional[int] = config_option(None, "must equal encoder-embed-dim")
    decoder_ffn_embed_dim: Optional[int] = config_option(None, "must equal encoder-ffn-embed-dim")
    decoder_layers: Optional[int] = config_option(
        None, "decoder layers; default: as many as encoder layers"
    )
    decoder_attention_heads: Optional[int] = config_option(
        None, "must equal encoder-attention-heads"
    )
    dropout: float = config_option(0.1, "dropout")
    attention_dropout: float = config_option(0.1, "dropout of attention weights")
    activation_dropout: float = config_option(0.0, "dropout after the feed-forward activation")
    activation_fn: str = config_option("relu", "relu or gelu")
    max_positions: int = config_option(1024, "longest sequence")
    encoder_rp_bins: int = config_option(32, "relative position buckets")
    encoder_rp_max_dist: int = config_option(
        128, "distance from which all positions share one bucket"
    )
    init_token_std: Optional[float] = config_option(
        None, "standard deviation of the initial token embeddings; default: as published"
    )
    init_position_std: Optional[float] = config_option(
        None, "standard deviation of the initial position tables; default: as published"
    )
    init_neighbour_slope: float = config_option(
        0.0, "each head starts by looking at one neighbour, with this slope of the relative bias"
    )
    init_copy_gain: float = config_option(
        0.0, "cross-attention starts by copying the token at its position, with this gain"
    )


@dataclass
class LargeSizes:
    """Sizes of the large architectures; named before a configuration among its bases."""

    encoder_embed_dim: int = 1024
    encoder_ffn_embed_dim: int = 4096
    encoder_layers: int = 24
    encoder_attention_heads: int = 16
    encoder_rp_bins: int = 128
    encoder_rp_max_dist: int = 256


def metro_t5_config(cfg: T5ModelConfig, dictionary) -> MetroT5Config:
    """Build the main model's configuration; refuse what it cannot express."""
    for name in ("embed_dim", "ffn_embed_dim", "attention_heads"):
        encoder, decoder = getattr(cfg, f"encoder_{name}"), getattr(cfg, f"decoder_{name}")
        if decoder is not None and decoder != encoder:
            raise UserError(
                f"encoder_{name} is {encoder} but decoder_{name} is {decoder}; METRO-T5 has one "
                f"width for both: make them equal or leave decoder_{name} out"
            )
    if cfg.encoder_embed_dim % cfg.encoder_attention_heads:
        raise UserError(
            f"encoder_embed_dim {cfg.encoder_embed_dim} is not divisible by "
            f"encoder_attention_heads {cfg.encoder_attention_heads}"
        )
    options = {field: getattr(cfg, name) for name, field in MODEL_OPTIONS.items()}
    options["num_decoder_layers"] = cfg.decoder_layers or cfg.encoder_layers
    return MetroT5Config(
        **options,
        vocab_size=len(dictionary),
        d_kv=cfg.encoder_embed_dim // cfg.encoder_attention_heads,
        layer_norm_epsilon=1e-5,
        pad_token_id=dictionary.pad(),
        bos_token_id=dictionary.bos(),
        eos_token_id=dictionary.eos(),
        decoder_start_token_id=dictionary.index("<sen000>"),
    )


def initialization(cfg: T5ModelConfig) -> Initialization:
    """Options of the initial weights as the library takes them."""
    names = [field.name for field in fields(Initialization)]
    given = {name: getattr(cfg, f"init_{name}", None) for name in names}
    return Initialization(**{name: std for name, std in given.items() if std is not None})


def check_vocabulary(state: dict, config: MetroT5Config) -> None:
    """Refuse weights of another vocabulary."""
    for name, tensor in state.items():
        if name.endswith(("shared.weight", "embed_tokens.weight")):
            if tensor.shape[0] != config.vocab_size:
                raise UserError(
                    f"the checkpoint has a vocabulary of {tensor.shape[0]} entries ({name}), the "
                    f"task one of {config.vocab_size} (dict.txt, special symbols and "
                    "tokens_per_sample sentinels). Use the dict.txt that the checkpoint was "
                    "trained with and the same tokens_per_sample"
                )
