"""Model options under fairseq's names; `metro.pretraining.building` translates them."""

from dataclasses import dataclass
from typing import Optional  # fairseq reads Optional[...], not X | None

from fairseq.dataclass import FairseqDataclass

from fairseq_plugins.option import config_option, options_of
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.building import main_config
from metro.pretraining.settings import SIZES, ModelOptions
from metro.utils.messages import UserError

BASE, LARGE = ({name: sizes[i] for name, sizes in SIZES.items()} for i in (0, 1))
OF_METRO = (
    *("generator_layers", "generator_zero_dropout", "generator_sample_mode", "rtd_head"),
    *("share_generator_discriminator_embed", "init_auxiliary_std"),
)


@dataclass
@options_of(ModelOptions, without=OF_METRO, **BASE)
class T5ModelConfig(FairseqDataclass):
    """Base size. `decoder_*` options that are left out follow `encoder_*`."""

    decoder_embed_dim: Optional[int] = config_option(None, "must equal encoder-embed-dim")
    decoder_ffn_embed_dim: Optional[int] = config_option(None, "must equal encoder-ffn-embed-dim")
    decoder_attention_heads: Optional[int] = config_option(
        None, "must equal encoder-attention-heads"
    )


def metro_t5_config(cfg: T5ModelConfig, dictionary) -> MetroT5Config:
    """Build the main model's configuration; refuse what it cannot express."""
    return main_config(cfg, len(dictionary), dictionary.index("<sen000>"))


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
