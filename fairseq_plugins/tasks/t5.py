"""Task `t5`: span corruption."""

from dataclasses import dataclass

from fairseq.logging import metrics
from fairseq.tasks import register_task

from fairseq_plugins.option import options_of
from fairseq_plugins.tasks._pretraining import OF_METRO, PretrainingConfig, PretrainingTask
from metro.pretraining.settings import TaskOptions, check_shares


@dataclass
@options_of(TaskOptions, without=OF_METRO, mask_multiple_length=5)
class T5Config(PretrainingConfig):
    pass


@register_task("t5", dataclass=T5Config)
class T5Task(PretrainingTask):
    """T5 pretraining by span corruption.

    `ntokens` counts target tokens, so that fairseq's own criterion divides by them, and `wps` is of
    them, too: logged again as `target_wps`, beside the `text_wps` that the original calls `wps`.
    """

    is_metro = False

    def __init__(self, cfg: T5Config, dictionary):
        super().__init__(cfg, dictionary)
        check_shares(cfg, "empty_prob")

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
