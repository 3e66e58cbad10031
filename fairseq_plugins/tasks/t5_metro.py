"""Task `t5_metro`: masked text for the auxiliary model, the original as the decoder's target."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fairseq import utils
from fairseq.logging import metrics
from fairseq.tasks import register_task

from fairseq_plugins.data import Corruption
from fairseq_plugins.option import config_option
from fairseq_plugins.tasks._pretraining import (
    PretrainingConfig,
    PretrainingTask,
    check_mask_length,
    check_shares,
)
from metro.data.collation import MaskedExample, collate_masked
from metro.data.prepared_folder import TEXT_MANIFEST
from metro.data.text.ngrams import NAMES
from metro.pretraining.masking import mask_tokens, sampling_seed
from metro.utils.files import read_json
from metro.utils.messages import UserError


@dataclass
class T5MetroConfig(PretrainingConfig):
    leave_unmasked_prob: float = config_option(
        0.1, "share of the masked positions that keep their token"
    )
    random_token_prob: float = config_option(
        0.1, "share of the masked positions that get a random token"
    )
    mask_multiple_length: int = config_option(1, "number of neighbouring tokens masked together")
    mask_stdev: float = config_option(0.0, "only 0 is implemented")


def mask_block(original_ids, random, index: int, epoch: int, seed: int, **options) -> MaskedExample:
    """Mask a block for the auxiliary model; options as of `mask_tokens`."""
    masked_ids, is_masked = mask_tokens(original_ids, random, **options)
    sampled_by = sampling_seed(seed, epoch, index)
    return MaskedExample(index, original_ids, masked_ids, is_masked, sampled_by)


@register_task("t5_metro", dataclass=T5MetroConfig)
class T5MetroTask(PretrainingTask):
    """METRO pretraining."""

    def __init__(self, cfg: T5MetroConfig, dictionary):
        super().__init__(cfg, dictionary)
        if cfg.mask_stdev != 0:
            raise UserError(
                f"mask_stdev is {cfg.mask_stdev}; masks of random length are not implemented "
                "(no published run used them): set it to 0"
            )
        check_shares(cfg, "leave_unmasked_prob", "random_token_prob")
        check_mask_length(cfg)
        manifest = read_json(Path(utils.split_paths(cfg.data)[0], TEXT_MANIFEST)) or {}
        self.reference_bits = manifest.get("reference_bits") or {}

    merge = staticmethod(collate_masked)

    def corruption(self) -> Corruption:
        cfg = self.cfg
        return partial(
            mask_block,
            seed=cfg.seed,
            mask_id=self.first_sentinel,
            vocab_size=len(self.dictionary),
            num_special=self.dictionary.nspecial,
            mask_prob=cfg.mask_prob,
            leave_unmasked_prob=cfg.leave_unmasked_prob,
            random_token_prob=cfg.random_token_prob,
            mask_multiple_length=cfg.mask_multiple_length,
        )

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        if not criterion.training:  # lines to see the validation loss against
            for name in NAMES:
                if name in self.reference_bits:
                    metrics.log_scalar(f"{name}_bits", self.reference_bits[name], round=3)
