"""What is logged of pretraining, under the published names: losses in bits, shares in percent."""

import math
from collections.abc import Mapping
from typing import Any

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
# the same of T5Losses
T5_SUMS = {
    "loss": "total",
    "sample_size": "sample_size",
    "nll_loss": "nll",
    "n_correct": "num_correct",
}

# logged mean -> (sum, what it is divided by); natural logarithms become bits
MEANS = {
    "loss": ("loss", "sample_size"),
    "nll_loss": ("discriminator_nll_loss", "sample_size"),
    "generator_loss": ("generator_loss", "generator_sample_size"),
    "discriminator_loss": ("discriminator_loss", "sample_size"),
    "rtd_loss": ("rtd_loss", "rtd_sample_size"),
}
T5_MEANS = {"loss": ("loss", "sample_size"), "nll_loss": ("nll_loss", "sample_size")}

# logged percentage -> (count, the counts whose sum it is a share of)
SHARES = {
    "generator_accuracy": ("generator_n_correct", ("generator_sample_size",)),
    "replaced_accuracy": ("replaced_n_correct", ("replaced_total",)),
    "unreplaced_accuracy": ("unreplaced_n_correct", ("unreplaced_scored_total",)),
    "rtd_replaced_accuracy": ("rtd_replaced_n_correct", ("replaced_total",)),
    "rtd_unreplaced_accuracy": ("rtd_unreplaced_n_correct", ("unreplaced_total",)),
    "replace_ratio": ("replaced_total", ("replaced_total", "unreplaced_total")),
}
T5_SHARES = {"accuracy": ("n_correct", ("sample_size",))}


def percentage(sums: Mapping[str, float], part: str, wholes: tuple[str, ...]) -> float:
    """Return the share in percent; NaN of nothing."""
    whole = sum(sums[name] for name in wholes)
    return round(float(sums[part] * 100.0 / whole), 3) if whole else float("nan")


def rtd_label_entropy(replaced: float, total: float) -> float:
    """Bits of guessing replaced positions by their frequency alone; see `rtd_loss` against it."""
    if total == 0:
        return float("nan")
    shares = (replaced / total, 1 - replaced / total)
    return round(-sum(share * math.log2(share) for share in shares if share > 0), 3)


def summarized(sums: Mapping[str, Any]) -> dict[str, float]:
    """Compute what is logged from the sums of `SUMS` or `T5_SUMS`, without what has no value."""
    is_metro = "generator_loss" in sums
    means, shares = (MEANS, SHARES) if is_metro else (T5_MEANS, T5_SHARES)
    found = {
        name: float(sums[part]) / float(sums[whole]) / math.log(2)
        for name, (part, whole) in means.items()
        if sums[whole] > 0
    }
    if "nll_loss" in found:
        found["ppl"] = 2 ** min(found["nll_loss"], 100.0)
    found |= {name: percentage(sums, *parts) for name, parts in shares.items()}
    if is_metro:
        replaced, total = float(sums["replaced_total"]), float(sums["rtd_sample_size"])
        found["rtd_label_entropy"] = rtd_label_entropy(replaced, total)
    return {name: round(value, 6) for name, value in found.items() if math.isfinite(value)}
