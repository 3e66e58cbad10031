"""Criterion `t5_metro`: calls the METRO model and logs its sums under the published names."""

import math
from dataclasses import dataclass

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from fairseq_plugins.option import options_of
from metro.pretraining.building import objective
from metro.pretraining.losses import MetroObjective
from metro.pretraining.metrics import MEANS, SHARES, SUMS, percentage, rtd_label_entropy
from metro.pretraining.settings import CriterionOptions

COUNTS = (
    "generator_n_correct",
    "generator_total",
    "replaced_n_correct",
    "replaced_total",
    "unreplaced_n_correct",
    "unreplaced_total",
    "unreplaced_scored_total",
    "rtd_replaced_n_correct",
    "rtd_unreplaced_n_correct",
    "rtd_total",
)


@dataclass
@options_of(CriterionOptions)
class T5MetroCriterionConfig(FairseqDataclass):
    pass


@register_criterion("t5_metro", dataclass=T5MetroCriterionConfig)
class T5MetroCriterion(FairseqCriterion):
    """METRO's three losses.

    With `masked_positions_only` lm or both, only masked positions are projected to the vocabulary,
    so `unreplaced_accuracy` is over the masked positions that got their own token back
    (`unreplaced_scored_total`); with none it is over all unreplaced positions. The other metrics
    are over what their names say.
    """

    def __init__(self, task, objective: MetroObjective):
        super().__init__(task)
        self.objective = objective

    @classmethod
    def build_criterion(cls, cfg: T5MetroCriterionConfig, task):
        return cls(task, objective(cfg))

    def forward(self, model, sample, reduce=True):
        losses = model(**sample["net_input"], objective=self.objective)
        sums = {name: getattr(losses, source).detach() for name, source in SUMS.items()}
        return losses.total, losses.sample_size, {**sums, "nsentences": sample["nsentences"]}

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        sums = {name: sum(output.get(name, 0) for output in logging_outputs) for name in SUMS}
        sums = on_host(sums)
        sums["generator_total"] = sums["generator_sample_size"]
        sums["rtd_total"] = sums["rtd_sample_size"]
        for name, (numerator, denominator) in MEANS.items():
            weight = sums[denominator]
            if weight > 0:
                metrics.log_scalar(name, sums[numerator] / weight / math.log(2), weight, round=3)
        for name in COUNTS:
            metrics.log_scalar_sum(name, sums[name], round=0)
        if sums["sample_size"] > 0:  # else nothing was scored, and nll_loss was not logged
            metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        for name, (part, wholes) in SHARES.items():
            metrics.log_derived(name, _percentage(part, wholes))
        metrics.log_derived("rtd_label_entropy", _rtd_label_entropy)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def on_host(sums: dict) -> dict:
    """Fetch the numbers in their types, synchronising with the GPU once instead of for each.

    float64 in between is exact for float32 and for counts.
    """
    of_device = {
        name: value
        for name, value in sums.items()
        if isinstance(value, torch.Tensor) and value.device.type != "cpu"
    }
    if not of_device:
        return sums
    values = torch.stack([value.double() for value in of_device.values()]).cpu()
    fetched = zip(of_device.items(), values, strict=True)
    return {**sums, **{name: here.to(there.dtype) for (name, there), here in fetched}}


def _percentage(part: str, wholes: tuple[str, ...]):
    def compute(meters) -> float:
        names = {name: name.replace("sample_size", "total") for name in (part, *wholes)}
        return percentage({name: meters[names[name]].sum for name in names}, part, wholes)

    return compute


def _rtd_label_entropy(meters) -> float:
    return rtd_label_entropy(float(meters["replaced_total"].sum), float(meters["rtd_total"].sum))
