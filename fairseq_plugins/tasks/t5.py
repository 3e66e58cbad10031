"""Task `t5`: span corruption."""

from dataclasses import dataclass

from fairseq.tasks import register_task

from fairseq_plugins.option import option
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
    empty_prob: float = option(0.1, "share of mask-prob spent on empty spans")
    mask_multiple_length: int = option(5, "longest span")


@dataclass(frozen=True)
class SpanCorruption:
    """Replaces spans by sentinels; options as of `metro.pretraining.masking.corrupt_spans`."""

    first_sentinel_id: int
    max_positions: int
    mask_prob: float
    empty_prob: float
    mask_multiple_length: int
    max_target_tokens: int | None

    def __call__(self, original_ids, random, index: int, epoch: int) -> SpanExample:
        return SpanExample(index, *corrupt_spans(original_ids, random, **vars(self)))


@register_task("t5", dataclass=T5Config)
class T5Task(PretrainingTask):
    """T5 pretraining by span corruption.

    `ntokens` counts target tokens, so that fairseq's own criterion divides by them.
    """

    def __init__(self, cfg: T5Config, dictionary):
        super().__init__(cfg, dictionary)
        check_shares(cfg, "empty_prob")
        check_mask_length(cfg)

    merge = staticmethod(collate_spans)

    def corruption(self) -> SpanCorruption:
        return SpanCorruption(
            first_sentinel_id=self.first_sentinel,
            max_positions=self.cfg.tokens_per_sample,
            mask_prob=self.cfg.mask_prob,
            empty_prob=self.cfg.empty_prob,
            mask_multiple_length=self.cfg.mask_multiple_length,
            max_target_tokens=self.max_width,
        )
