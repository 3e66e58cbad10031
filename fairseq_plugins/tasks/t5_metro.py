"""Task `t5_metro`: masked text for the auxiliary model, the original as the decoder's target."""

from dataclasses import dataclass, field

import numpy as np
import torch
from fairseq.tasks import register_task

from fairseq_plugins.data import pad_batch, shift_right
from fairseq_plugins.tasks._pretraining import PretrainingConfig, PretrainingTask
from metro.pretraining.masking import mask_tokens, sampling_seed


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
            raise ValueError(
                f"mask_stdev is {cfg.mask_stdev}; masks of random length are not implemented "
                "(no published run used them): set it to 0"
            )

    def corrupt(self, original_ids, random, index: int, epoch: int) -> dict:
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
        return {
            "id": index,
            "masked_ids": masked.masked_ids,
            "is_masked": masked.is_masked,
            "original_ids": original_ids,
            "sampling_seed": sampling_seed(cfg.seed, epoch, index),
        }

    def collate(self, examples: list[dict]) -> dict:
        pad = self.dictionary.pad()
        originals = [example["original_ids"] for example in examples]
        original_ids = pad_batch(originals, pad)
        starts = [shift_right(ids, self.first_sentinel) for ids in originals]
        targets = [np.where(e["is_masked"], e["original_ids"], pad) for e in examples]
        lengths = [len(ids) for ids in originals]
        return {
            **self._ids_and_sizes(examples, sum(lengths)),
            "net_input": {
                "src_tokens": pad_batch([example["masked_ids"] for example in examples], pad),
                "src_lengths": torch.tensor(lengths),
                "prev_output_tokens": pad_batch(starts, pad),
                "original_ids": original_ids,
                "is_masked": pad_batch([example["is_masked"] for example in examples], False),
                "sampling_seed": torch.tensor([example["sampling_seed"] for example in examples]),
                # known here, so that the model need not wait for the device to count
                "max_masked": max(int(example["is_masked"].sum()) for example in examples),
            },
            "generator_target": pad_batch(targets, pad),
            "discriminator_target": original_ids,
        }
