"""Draw the losses of a pretraining run.

    python scripts/plot_training.py demo/model demo/losses.png

Takes the output folder of `metro pretrain`, or what fairseq-train has printed or written to
--log-file with common.log_format=json: whatever stands before the JSON object on a line is ignored.
Interrupted and resumed runs are one curve. Dashed lines are what models without context, or with
one or two tokens of it, would reach; and for replaced token detection, guessing by frequency. T5's
loss has none: it is of the tokens of spans and their sentinels, not of those of running text.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from metro.utils.messages import UserError

LOSSES = {
    "generator_loss": "auxiliary model: masked language modelling",
    "discriminator_loss": "main model: corrective language modelling",
    "rtd_loss": "main model: replaced token detection",
}
T5_LOSSES = {"nll_loss": "T5: span corruption"}

REFERENCES = ("unigram_bits", "bigram_bits", "trigram_bits")
"""Counted by `metro prepare-text` and logged with the validation losses."""


class Curve(NamedTuple):
    """One metric over the updates."""

    updates: list[int]
    values: list[float]


def read_log(path: Path) -> dict[str, dict[str, Curve]]:
    """Curves by split ("train", "valid") and metric name.

    The last line about an update counts: fairseq repeats lines after the first epoch, and a resumed
    run repeats the updates since its checkpoint.
    """
    points: dict[str, dict[str, dict[int, float]]] = {
        "train": defaultdict(dict),
        "valid": defaultdict(dict),
    }
    for stats in read_statistics(path):
        if "valid_num_updates" in stats:
            split, prefix = "valid", "valid_"
        elif "num_updates" in stats:  # every log_interval updates
            split, prefix = "train", ""
        else:  # the mean over an epoch, which would be a second curve, or no statistics
            continue
        update = int(stats[f"{prefix}num_updates"])
        for key, value in stats.items():
            if key.startswith(prefix):
                try:
                    points[split][key.removeprefix(prefix)][update] = float(value)
                except (TypeError, ValueError):
                    pass
    return {
        split: {
            name: Curve(*map(list, zip(*sorted(at.items()), strict=True)))
            for name, at in metrics.items()
        }
        for split, metrics in points.items()
    }


def read_statistics(path: Path) -> list[dict]:
    """The statistics in a log, or in the newest state that a folder of `metro pretrain` holds."""
    if not path.is_dir():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [parse_line(line) for line in lines]
    states = sorted(path.rglob("trainer_state.json"), key=lambda file: file.stat().st_mtime)
    if not states:
        raise UserError("the run has not saved yet")
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [
        {**line, "valid_num_updates" if "valid_loss" in line else "num_updates": line["step"]}
        for line in history
    ]


def parse_line(line: str) -> dict:
    """The statistics on a line of the log, {} if it holds none."""
    start = line.find("{")
    if start < 0 or "num_updates" not in line:
        return {}
    try:
        stats = json.loads(line[start:])
    except json.JSONDecodeError:
        return {}
    return stats if isinstance(stats, dict) else {}


def draw(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """One panel per loss, training and validation in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = panels(curves)
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        lines = reference_lines(curves, name)
        train, valid = curves["train"][name], curves["valid"].get(name, Curve([], []))
        axis.plot(*train, label="train", linewidth=1.2)
        if valid.updates:
            axis.plot(*valid, "o-", label="valid", markersize=4)
        axis.set_ylim(*limits([train, valid, *lines.values()]))
        for label, curve in lines.items():
            axis.plot(*curve, "--", color="grey", linewidth=0.9)
            axis.annotate(label, (curve.updates[-1], curve.values[-1]), ha="right", fontsize=7)
        axis.set_title(f"{name}\n{names[name]}", fontsize=9)
        axis.set_xlabel("updates")
        axis.set_ylabel("bits per position")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def panels(curves: dict[str, dict[str, Curve]]) -> dict[str, str]:
    """The losses that are drawn -> what they are of: METRO's, or T5's.

    Raises:
        UserError: the log has none of them.
    """
    for losses in (LOSSES, T5_LOSSES):
        if found := {name: what for name, what in losses.items() if name in curves["train"]}:
            return found
    raise UserError(
        f"the log has no training line with any of {[*LOSSES, *T5_LOSSES]}: the first is written "
        "after log_interval updates of pretraining (with fairseq and common.log_format=json)"
    )


def limits(lines: list[Curve]) -> tuple[float, float]:
    """Ends of the axis, from what follows the first tenth of the updates: the fall before hides it.

    Args:
        lines: the training curve first.
    """
    first = lines[0].updates[-1] / 10
    values = [v for line in lines for u, v in zip(*line, strict=True) if u >= first]
    margin = 0.1 * (max(values) - min(values)) or 0.1
    return min(values) - margin, max(values) + margin


def reference_lines(curves: dict[str, dict[str, Curve]], name: str) -> dict[str, Curve]:
    """Label -> dashed line of a loss's panel. The main model sees most tokens, and has none."""
    train, valid = curves["train"], curves["valid"]
    if name == "rtd_loss":
        entropy = train.get("rtd_label_entropy")
        return {"guessing by frequency": entropy} if entropy else {}
    if name != "generator_loss":
        return {}
    ends = [train[name].updates[0], train[name].updates[-1]]
    found = {each.removesuffix("_bits"): valid[each] for each in REFERENCES if each in valid}
    return {label: Curve(ends, [line.values[-1]] * 2) for label, line in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="folder or file")
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    try:
        draw(read_log(args.log), args.png)
    except (OSError, ValueError) as error:
        parser.error(f"{args.log}: {error}")
    print(f"written: {args.png}")


if __name__ == "__main__":
    main()
