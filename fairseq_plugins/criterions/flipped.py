"""Criterion `flipped`: FLIPPED learning (Ye et al., ICLR 2023) on task `t5_prompt_finetuning`."""

from dataclasses import dataclass

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from fairseq_plugins.option import config_option
from metro.finetuning.losses import UNLIKELIHOOD_WEIGHT, LossOptions, check_unlikelihood_weight
from metro.utils.messages import UserError

# logged mean -> (sum, what it is divided by, decimals); natural logarithms
MEANS = {
    "loss": ("loss", "sample_size", 4),
    "likelihood": ("likelihood", "sample_size", 4),
    "unlikelihood": ("unlikelihood", "sample_size", 4),
    "right_prob": ("right_prob", "nsentences", 6),
    "wrong_prob": ("wrong_prob", "nsentences", 6),
    "right_log_prob": ("right_log_prob", "nsentences", 3),
    "wrong_log_prob": ("wrong_log_prob", "nsentences", 3),
    "ranked_right": ("ranked_right", "nsentences", 4),
}
COUNTS = ("sample_size", "nsentences", "ntokens", "skipped")


@dataclass
class FlippedCriterionConfig(FairseqDataclass):
    unlikelihood_weight: float = config_option(UNLIKELIHOOD_WEIGHT, "lambda; 0: likelihood alone")
    loss_mean: str = config_option(
        "tokens", "mean over tokens, or over examples as in the published training"
    )


@register_criterion("flipped", dataclass=FlippedCriterionConfig)
class FlippedCriterion(FairseqCriterion):
    """Likelihood of the instruction under the right label, unlikelihood under a wrong one.

    Logged in natural logarithms: both terms; the instruction's probability under right and wrong
    label and the logarithms of it, each a mean over examples; the share of examples whose right
    label makes it more probable.
    """

    objective = "flipped"

    def __init__(self, task, unlikelihood_weight, loss_mean):
        super().__init__(task)
        check_unlikelihood_weight(unlikelihood_weight)
        if loss_mean not in ("tokens", "examples"):
            raise UserError(f"loss_mean is {loss_mean!r}; use tokens or examples")
        pad = task.target_dictionary.pad()
        self.options = LossOptions("flipped", pad, loss_mean, unlikelihood_weight)

    def forward(self, model, sample, reduce=True):
        loss = model(**sample["net_input"], target_ids=sample["target"], loss_options=self.options)
        in_tokens = self.options.mean == "tokens"
        sample_size = sample["ntokens"] if in_tokens else sample["nsentences"]
        return (
            loss.total,
            sample_size,
            {
                **loss.sums,
                "loss": loss.total.detach(),
                "sample_size": sample_size,
                "nsentences": sample["nsentences"],
                "ntokens": sample["ntokens"],
                "skipped": sample["num_skipped"],
            },
        )

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        names = {*COUNTS, *(name for name, _, _ in MEANS.values())}
        sums = {name: sum(output.get(name, 0) for output in logging_outputs) for name in names}
        for name, (part, whole, decimals) in MEANS.items():
            if sums[whole] > 0:
                metrics.log_scalar(name, sums[part] / sums[whole], sums[whole], round=decimals)
        metrics.log_scalar_sum("skipped_examples", sums["skipped"], round=0)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
