"""Task `t5_metro`: masked text for the auxiliary model, the original as the decoder's target."""

from dataclasses import dataclass, field

from fairseq.tasks import register_task

from fairseq_plugins.tasks._pretraining import (
    PretrainingConfig,
    PretrainingTask,
    check_mask_length,
    check_shares,
)
from metro.data.collation import MaskedExample, collate_masked
from metro.pretraining.masking import mask_tokens, sampling_seed
from metro.utils.messages import UserError


@dataclass
class T5MetroConfig(PretrainingConfig):
    leave_unmasked_prob: float = field(
        default=0.1, metadata={"help": "share of the masked positions that keep their token"}
    )
    random_token_prob: float = field(
        default=0.1, metadata={"help": "share of the masked positions that get a random token"}
    )
    mask_multiple_length: int = field(
        default=1, metadata={"help": "number of neighbouring tokens masked together"}
    )
    mask_stdev: float = field(default=0.0, metadata={"help": "only 0 is implemented"})


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

    def corrupt(self, original_ids, random, index: int, epoch: int) -> MaskedExample:
        cfg = self.cfg
        masked = mask_tokens(
            original_ids,
            random,
            mask_id=self.first_sentinel,
            vocab_size=len(self.dictionary),
            num_special=self.dictionary.nspecial,
            mask_prob=cfg.mask_prob,
            leave_unmasked_prob=cfg.leave_unmasked_prob,
            random_token_prob=cfg.random_token_prob,
            mask_multiple_length=cfg.mask_multiple_length,
        )
        seed = sampling_seed(cfg.seed, epoch, index)
        return MaskedExample(index, original_ids, masked.masked_ids, masked.is_masked, seed)

    def collate(self, examples: list[MaskedExample]) -> dict:
        pad, start = self.dictionary.pad(), self.first_sentinel
        batch = collate_masked(examples, pad, start, self.max_width)
        return {
            "id": batch.indices,
            "nsentences": len(examples),
            "ntokens": sum(batch.lengths.tolist()),
            "net_input": {
                "src_tokens": batch.masked_ids,
                "src_lengths": batch.lengths,
                "prev_output_tokens": batch.decoder_input_ids,
                "original_ids": batch.original_ids,
                "is_masked": batch.is_masked,
                "sampling_seed": batch.sampling_seed,
                # known here, so that the model need not wait for the device to find out
                "max_masked": batch.max_masked,
                "has_padding": batch.has_padding,
            },
            "generator_target": batch.mlm_targets,
            "discriminator_target": batch.original_ids,
        }
