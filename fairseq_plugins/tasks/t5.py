"""Task `t5`: span corruption."""

from dataclasses import dataclass, field

import torch
from fairseq.tasks import register_task

from fairseq_plugins.data import pad_batch, shift_right
from fairseq_plugins.tasks._pretraining import PretrainingConfig, PretrainingTask
from metro.pretraining.masking import corrupt_spans


@dataclass
class T5Config(PretrainingConfig):
    empty_prob: float = field(
        default=0.1, metadata={"help": "share of mask-prob spent on empty spans"}
    )
    mask_multiple_length: int = field(default=5, metadata={"help": "longest span"})


@register_task("t5", dataclass=T5Config)
class T5Task(PretrainingTask):
    """T5 pretraining by span corruption.

    `ntokens` counts target tokens, so that fairseq's own criterion divides by them.
    """

    def corrupt(self, original_ids, random, index: int, epoch: int) -> dict:
        spans = corrupt_spans(
            original_ids,
            random,
            first_sentinel_id=self.first_sentinel,
            max_positions=self.cfg.tokens_per_sample,
            mask_prob=self.cfg.mask_prob,
            empty_prob=self.cfg.empty_prob,
            mask_multiple_length=self.cfg.mask_multiple_length,
        )
        return {"id": index, "input_ids": spans.input_ids, "target_ids": spans.target_ids}

    def collate(self, examples: list[dict]) -> dict:
        pad = self.dictionary.pad()
        inputs = [example["input_ids"] for example in examples]
        targets = [example["target_ids"] for example in examples]
        starts = [shift_right(ids, self.first_sentinel) for ids in targets]
        return {
            **self._ids_and_sizes(examples, sum(len(ids) for ids in targets)),
            "net_input": {
                "src_tokens": pad_batch(inputs, pad),
                "src_lengths": torch.tensor([len(ids) for ids in inputs]),
                "prev_output_tokens": pad_batch(starts, pad),
            },
            "target": pad_batch(targets, pad),
        }
