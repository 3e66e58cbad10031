"""Criterion `t5_metro`: calls the METRO model and logs its sums under the published names."""

import math
from dataclasses import dataclass

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from fairseq_plugins.option import config_option
from metro.pretraining.losses import MetroObjective

# published name of a logged sum -> field of MetroLosses
SUMS = {
    "loss": "total",
    "sample_size": "sample_size",
    "ntokens": "num_tokens",
    "generator_loss": "mlm_loss",
    "discriminator_loss": "corrective_lm_loss",
    "discriminator_nll_loss": "corrective_lm_nll",
    "rtd_loss": "rtd_loss",
    "generator_sample_size": "num_masked",
    "rtd_sample_size": "num_rtd",
    "generator_n_correct": "mlm_num_correct",
    "replaced_n_correct": "replaced_num_correct",
    "replaced_total": "num_replaced",
    "unreplaced_n_correct": "unreplaced_num_correct",
    "unreplaced_total": "num_unreplaced",
    "unreplaced_scored_total": "num_unreplaced_scored",
    "rtd_replaced_n_correct": "rtd_replaced_num_correct",
    "rtd_unreplaced_n_correct": "rtd_unreplaced_num_correct",
}

# logged mean -> (sum, what it is divided by); natural logarithms become bits
MEANS = {
    "loss": ("loss", "sample_size"),
    "nll_loss": ("discriminator_nll_loss", "sample_size"),
    "generator_loss": ("generator_loss", "generator_sample_size"),
    "discriminator_loss": ("discriminator_loss", "sample_size"),
    "rtd_loss": ("rtd_loss", "rtd_sample_size"),
}

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

# logged percentage -> (count, what it is a share of)
ACCURACIES = {
    "generator_accuracy": ("generator_n_correct", "generator_total"),
    "replaced_accuracy": ("replaced_n_correct", "replaced_total"),
    "unreplaced_accuracy": ("unreplaced_n_correct", "unreplaced_scored_total"),
    "rtd_replaced_accuracy": ("rtd_replaced_n_correct", "replaced_total"),
    "rtd_unreplaced_accuracy": ("rtd_unreplaced_n_correct", "unreplaced_total"),
}


@dataclass
class T5MetroCriterionConfig(FairseqDataclass):
    discriminator_loss_weight: float = config_option(1.0, "weight of the main model's loss")
    label_smoothing: float = config_option(0.0, "of the main model's loss")
    masked_positions_only: str = config_option(
        "lm",
        "which losses are restricted to masked positions: none, lm (the main model's) "
        "or both (that and replaced token detection)",
    )
    rtd_loss_weight: float = config_option(50.0, "weight of replaced token detection")
    rtd_only: bool = config_option(False, "leave out the main model's loss")
    weighted_lm_loss: bool = config_option(
        False, "weight the main model's loss by the probability of replacement"
    )
    divide_by_mean_weight: bool = config_option(
        False, "divide the weighted loss by the mean weight"
    )


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
        return cls(
            task,
            MetroObjective(
                corrective_lm_weight=cfg.discriminator_loss_weight,
                rtd_weight=cfg.rtd_loss_weight,
                positions=cfg.masked_positions_only,
                label_smoothing=cfg.label_smoothing,
                weighted_lm=cfg.weighted_lm_loss,
                divide_by_mean_weight=cfg.divide_by_mean_weight,
                rtd_only=cfg.rtd_only,
            ),
        )

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
        for name, (part, whole) in ACCURACIES.items():
            metrics.log_derived(name, _percentage(part, (whole,)))
        metrics.log_derived(
            "replace_ratio", _percentage("replaced_total", ("replaced_total", "unreplaced_total"))
        )
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
        whole = sum(meters[name].sum for name in wholes)
        if whole == 0:
            return float("nan")
        return round(float(meters[part].sum * 100.0 / whole), 3)

    return compute


def _rtd_label_entropy(meters) -> float:
    """Bits of guessing replaced positions by their frequency alone; see `rtd_loss` against it."""
    total = meters["rtd_total"].sum
    if total == 0:
        return float("nan")
    replaced = float(meters["replaced_total"].sum / total)
    shares = (replaced, 1 - replaced)
    return round(-sum(share * math.log2(share) for share in shares if share > 0), 3)
