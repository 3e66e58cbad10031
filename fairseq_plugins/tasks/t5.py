"""Task `t5`: span corruption."""

from dataclasses import dataclass
from functools import partial

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
from metro.data.collation import SpanExample, collate_spans
from metro.pretraining.masking import corrupt_spans


@dataclass
class T5Config(PretrainingConfig):
    empty_prob: float = config_option(0.1, "share of mask-prob spent on empty spans")
    mask_multiple_length: int = config_option(5, "longest span")


def corrupt_block(original_ids, random, index: int, epoch: int, **options) -> SpanExample:
    """Replace spans of a block by sentinels; options as of `corrupt_spans`."""
    corrupted = corrupt_spans(original_ids, random, **options)
    return SpanExample(index, *corrupted, num_text_tokens=len(original_ids))


@register_task("t5", dataclass=T5Config)
class T5Task(PretrainingTask):
    """T5 pretraining by span corruption.

    `ntokens` counts target tokens, so that fairseq's own criterion divides by them, and `wps` is of
    them, too: logged again as `target_wps`, beside the `text_wps` that the original calls `wps`.
    """

    def __init__(self, cfg: T5Config, dictionary):
        super().__init__(cfg, dictionary)
        check_shares(cfg, "empty_prob")
        check_mask_length(cfg)

    merge = staticmethod(collate_spans)

    def train_step(self, sample, *args, **kwargs):
        loss, sample_size, logging_output = super().train_step(sample, *args, **kwargs)
        logging_output["num_text_tokens"] = sample["num_text_tokens"]
        return loss, sample_size, logging_output

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        for name, count in (("text_wps", "num_text_tokens"), ("target_wps", "ntokens")):
            if any("num_text_tokens" in output for output in logging_outputs):  # not in validation
                number = sum(output.get(count, 0) for output in logging_outputs)
                metrics.log_speed(name, number, priority=90, round=1)

    def corruption(self) -> Corruption:
        return partial(
            corrupt_block,
            first_sentinel_id=self.first_sentinel,
            max_positions=self.cfg.tokens_per_sample,
            mask_prob=self.cfg.mask_prob,
            empty_prob=self.cfg.empty_prob,
            mask_multiple_length=self.cfg.mask_multiple_length,
            max_target_tokens=self.max_width,
        )
