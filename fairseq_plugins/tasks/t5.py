"""Task `t5`: span corruption."""

from dataclasses import dataclass, field

from fairseq.tasks import register_task

from fairseq_plugins.tasks._pretraining import (
    PretrainingConfig,
    PretrainingTask,
    check_mask_length,
    check_shares,
)
from metro.data.collation import SpanExample, collate_spans
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

    def __init__(self, cfg: T5Config, dictionary):
        super().__init__(cfg, dictionary)
        check_shares(cfg, "empty_prob")
        check_mask_length(cfg)

    def corrupt(self, original_ids, random, index: int, epoch: int) -> SpanExample:
        spans = corrupt_spans(
            original_ids,
            random,
            first_sentinel_id=self.first_sentinel,
            max_positions=self.cfg.tokens_per_sample,
            mask_prob=self.cfg.mask_prob,
            empty_prob=self.cfg.empty_prob,
            mask_multiple_length=self.cfg.mask_multiple_length,
            max_target_tokens=self.max_width,
        )
        return SpanExample(index, spans.input_ids, spans.target_ids)

    def collate(self, examples: list[SpanExample]) -> dict:
        pad, start = self.dictionary.pad(), self.first_sentinel
        batch = collate_spans(examples, pad, start, self.max_width)
        return {
            "id": batch.indices,
            "nsentences": len(examples),
            "ntokens": batch.num_target_tokens,
            "net_input": {
                "src_tokens": batch.input_ids,
                "src_lengths": batch.lengths,
                "prev_output_tokens": batch.decoder_input_ids,
                "has_padding": batch.has_padding,
            },
            "target": batch.target_ids,
        }
