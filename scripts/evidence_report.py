"""Statistics, table, page and figure of scripts/evidence.py, from its JSON files alone.

The unit is the seed of pretraining, to which everything after it is tied. Two arms are compared by
the paired difference of each seed; its interval is a percentile bootstrap of 95 %: seeds are drawn
with replacement, and so are the examples of each dataset, the same ones for both arms and, as all
seeds are tested on the same examples, for all seeds. Of minimal pairs the examples are the
paradigms.

Shapes: R resamples, S seeds, N examples.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metro.utils.files import read_json, write_text
from metro.utils.messages import UserError, counted

RESAMPLES = 2000


class Difference(NamedTuple):
    """Difference of two arms, in percentage points."""

    mean: float
    low: float
    high: float
    per_seed: list[float]


def read_results(folder: Path) -> list[dict]:
    """Read every run's file.

    Raises:
        UserError: there is none.
    """
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder} has no results: let scripts/evidence.py make runs first")
    return found


def outcomes(result: Mapping) -> dict[str, np.ndarray]:
    """What a run got right: dataset -> (N,) of 0 to 1; ``blimp`` -> accuracy of each paradigm."""
    prompts = result.get("prompts", 1)
    found = {
        name: np.array([*map(int, right)]) / prompts for name, right in result["right"].items()
    }
    if "decoder" in result.get("blimp", {}):
        found["blimp"] = np.array([*result["blimp"]["decoder"]["paradigms"].values()])
    return found


def by_seed(results: Sequence[Mapping], arm: str) -> dict[int, dict[str, np.ndarray]]:
    return {each["seed"]: outcomes(each) for each in results if each["arm"] == arm}


def difference(
    first: Mapping[int, Mapping[str, np.ndarray]],
    second: Mapping[int, Mapping[str, np.ndarray]],
    tasks: Sequence[str],
    resamples: int = RESAMPLES,
) -> Difference | None:
    """Compare two arms by the mean over tasks, on the seeds that both have; None if there is none.

    Args:
        first, second: seed -> task -> (N,) outcomes of the same examples.
        tasks: to average over.
        resamples: R.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds or not tasks:
        return None
    random = np.random.default_rng(0)
    drawn_RS = random.integers(len(seeds), size=(resamples, len(seeds)))
    means_R, means_S = np.zeros(resamples), np.zeros(len(seeds))
    for task in tasks:
        paired_SN = np.stack([first[seed][task] - second[seed][task] for seed in seeds])
        num = paired_SN.shape[1]
        counts_RN = random.multinomial(num, np.full(num, 1 / num), size=resamples)
        drawn_means_RS = np.take_along_axis(counts_RN @ paired_SN.T / num, drawn_RS, 1)
        means_R += drawn_means_RS.sum(1)
        means_S += paired_SN.mean(1)
    means_R /= len(tasks) * len(seeds)
    low, high = 100 * np.percentile(means_R, [2.5, 97.5])
    per_seed = [float(each) for each in 100 * means_S / len(tasks)]
    return Difference(float(np.mean(per_seed)), float(low), float(high), per_seed)


def write_report(plan: Mapping, results: Sequence[Mapping], page: Path) -> None:
    """Write the page, and its figure into the folder ``images`` beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    figure = page.parent / "images" / f"{page.stem}.svg"
    figure.parent.mkdir(exist_ok=True)
    draw(plan, results, figure)
    write_text(page, text_of(plan, results, os.path.relpath(figure, page.parent)))


def text_of(plan: Mapping, results: Sequence[Mapping], figure: str) -> str:
    """The page as Markdown."""
    arms = [name for name in plan["arms"] if by_seed(results, name)]
    datasets = list(plan["datasets"])
    title = {name: plan["arms"][name]["title"] for name in arms}
    pretrained = [run for run in results if run["arm"] in arms]
    # T5's log counts the tokens of its targets; the batches of all arms are the same.
    of_text = [r["tokens_per_update"] for r in pretrained if plan["arms"][r["arm"]].get("rtd")]
    read = float(np.mean(of_text))
    sizes = [f"{name} {len(pretrained[0]['right'][name])}" for name in datasets]
    lines = [
        "# Evidence",
        f"{plan['about'].strip()}",
        f"Endpoint, fixed before the first run: {plan['endpoint'].strip()}",
        f"![Validation loss over time, and accuracy of each seed]({figure})",
        "## Arms",
        "Means over seeds. Bits are the arm's own validation loss at the end: METRO's of the "
        "original tokens at all positions, given a corrupted text, most of which are copied; T5's "
        "of the tokens of its spans. They are not comparable between the two. "
        + pairs_text(plan, pretrained),
        table(
            [
                "arm",
                "seeds",
                "learning rates",
                "updates",
                "M tokens",
                "minutes",
                "bits",
                "BLiMP",
                "RTD head",
            ],
            [arm_row(title[name], [r for r in results if r["arm"] == name], read) for name in arms],
        ),
        *learnt_of(plan, results, read),
        "## Accuracy after finetuning",
        f"Percent of the test rows ({', '.join(sizes)}), mean over seeds.",
        table(
            ["arm", *datasets, "mean"],
            [
                [title[name], *(f"{value:.1f}" for value in accuracies(results, name, datasets))]
                for name in arms
            ],
        ),
        "## Differences",
        "Paired by seed, in points; in brackets the 95 % interval of a bootstrap over seeds and "
        f"examples ({RESAMPLES:,} resamples); the datasets are as they are, not a sample of more. "
        f"The first {plan['primary']} rows are the endpoint.",
        table(
            ["", "mean of the datasets", "difference per seed", *datasets, "BLiMP"],
            [
                difference_row(results, title, first, second, datasets)
                for first, second in plan["compare"]
                if first in arms and second in arms
            ],
        ),
        *objectives_of(plan, results),
        *(["## What it shows", plan["reading"].strip()] if "reading" in plan else []),
        "## What this does not show",
        plan["limits"].strip(),
        *made_by(plan, results),
    ]
    return "\n\n".join(lines) + "\n"


def made_by(plan: Mapping, results: Sequence[Mapping]) -> list[str]:
    """The command, and the seeds and rates of each arm."""
    named = {**plan["arms"], **plan.get("objectives", {}).get("arms", {})}
    of_arms = []
    for name, options in named.items():
        if runs := [run for run in results if run["arm"] == name]:
            seeds = ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs))
            rates = f"{runs[0]['rate']:g} and {runs[0]['finetuning_rate']:g}"
            of_arms.append(f"{options['title']}: {seeds} ({rates})")
    return [
        f"{counted(len(results), 'run')}; seeds of each arm, and rates of pretraining and "
        f"finetuning: {'; '.join(of_arms)}. Made, and made again, by",
        "```bash\npython scripts/evidence.py PLAN --text TEXT "
        "--data-dir ROWS --results NEW_FOLDER\n```",
    ]


def pairs_text(plan: Mapping, results: Sequence[Mapping]) -> str:
    """Say what the columns of minimal pairs are, empty where there are none."""
    counts = {len(run["blimp"]["decoder"]["paradigms"]) for run in results if run.get("blimp")}
    if not counts:
        return ""
    return (
        f"BLiMP is the mean over {max(counts)} paradigms of at most {plan['blimp_limit']} pairs "
        "(guessing: 50; in brackets the 95 % interval over seeds and paradigms), by the decoder, "
        "asked in the form it was pretrained on ([minimal pairs](evaluation.md#minimal-pairs): "
        "METRO `restore`, T5 `blanks`), and by METRO's head of replaced token detection."
    )


def learnt_of(plan: Mapping, results: Sequence[Mapping], tokens_per_update: float) -> list[str]:
    """Sections about what arms with an RTD head have learnt before anything is compared."""
    sections = []
    for name, options in plan["arms"].items():
        runs = [run for run in results if run["arm"] == name and options.get("rtd")]
        valid = [run["valid"] for run in runs]
        if valid:
            mean = {key: np.mean([curves[key][1] for curves in valid], 0) for key in valid[0]}
            tokens = np.array(valid[0]["rtd_loss"][0]) * tokens_per_update / 1e6
            header = ["held-out text", "at the end", "to pass", "passed after M tokens"]
            sections += [
                f"## What {options['title']} has learnt",
                "Means over seeds.",
                table(header, learnt_rows(mean, tokens) + probe_rows(runs)),
            ]
    return sections


def learnt_rows(mean: Mapping[str, np.ndarray], tokens: np.ndarray) -> list[list[str]]:
    """The auxiliary model, RTD and the decoder beside what is simpler, by their curves."""
    bits, ratio = mean["generator_loss"], mean["rtd_loss"] / mean["rtd_label_entropy"]
    passes = [(f"{n} ", bits, mean[f"{n}_bits"][-1]) for n in ("unigram", "bigram", "trigram")]
    rows = []
    for title, curve, bound in [*passes, ("", ratio, 0.9)]:
        measure = "bits of the auxiliary model" if title else "RTD loss, over its labels' entropy"
        is_below = np.flatnonzero(curve < bound)
        when = f"{tokens[is_below[0]]:.1f}" if len(is_below) else "never"
        rows.append([measure, f"{curve[-1]:.3f}", f"{title}{bound:.3f}", when])
    for key, what in (
        ("rtd_replaced_accuracy", "replaced tokens that RTD detects, %"),
        ("rtd_unreplaced_accuracy", "other tokens that RTD leaves alone, %"),
        ("replaced_accuracy", "replaced tokens that are the decoder's first choice, %"),
    ):
        if key in mean:
            rows.append([what, f"{mean[key][-1]:.1f}", "", ""])
    return rows


def probe_rows(runs: Sequence[Mapping]) -> list[list[str]]:
    """What `make demo` measures as well, of the runs that were measured so."""
    probes = [run["probe"] for run in runs if "probe" in run]
    if not probes:
        return []
    mean = {key: float(np.mean([probe[key] for probe in probes])) for key in probes[0]}
    detected = f"planted words that RTD marks, at {mean['false_alarms']:.1f} % false alarms, %"
    restored = "of these restored by the decoder's best other token, %"
    return [
        [detected, f"{mean['recall']:.1f}", "20", ""],
        [restored, f"{mean['restored']:.1f}", f"bigram {mean['restored_by_bigram']:.1f}", ""],
    ]


def objectives_of(plan: Mapping, results: Sequence[Mapping]) -> list[str]:
    """The section about objectives of finetuning, empty where nothing of it was run."""
    options = plan.get("objectives")
    arms = [name for name in options["arms"] if by_seed(results, name)] if options else []
    if not options or not arms:
        return []
    title = {name: options["arms"][name]["title"] for name in arms}
    sections = ["## Objectives of finetuning", options["about"].strip()]
    for unseen in ("", ", unseen"):
        datasets = [f"{name}{unseen}" for name in options["datasets"]]
        rows = [
            [title[name], *(f"{value:.1f}" for value in accuracies(results, name, datasets)), ""]
            for name in arms
        ]
        for first, second in options["compare"]:
            if first in arms and second in arms:
                pair = by_seed(results, first), by_seed(results, second)
                tasks = [*([name] for name in datasets), datasets]
                cells = [interval(difference(*pair, each)) for each in tasks]
                seeds = per_seed(difference(*pair, datasets))
                rows.append([f"{title[first]} − {title[second]}", *cells, seeds])
        sections.append(table(["", *datasets, "mean", "difference per seed"], rows))
    return sections


def arm_row(title: str, runs: Sequence[Mapping], tokens_per_update: float) -> list[str]:
    """Numbers of an arm's pretraining, means over its runs."""

    def mean(values) -> str:
        found = [value for value in values if value is not None]
        return f"{np.mean(found):.2f}" if found else ""

    def last(run: Mapping, *names: str):
        return next((run["valid"][name][1][-1] for name in names if name in run["valid"]), None)

    def pairs(method: str) -> str:
        asked = {run["seed"]: run["blimp"].get(method) for run in runs}
        found = {n: np.array([*each["paradigms"].values()]) for n, each in asked.items() if each}
        beside = difference(
            {seed: {"blimp": values} for seed, values in found.items()},
            {seed: {"blimp": np.full(len(values), 0.5)} for seed, values in found.items()},
            ["blimp"],
        )
        if beside is None:
            return ""
        mean, low, high = (50 + value for value in beside[:3])
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    first = runs[0]
    tokens = first["updates"] * tokens_per_update / 1e6
    minutes = first["updates"] * first["seconds_per_update"] / 60
    return [
        title,
        str(len(runs)),
        f"{first['rate']:g}, {first['finetuning_rate']:g}",
        f"{first['updates']:,}",
        f"{tokens:.2f}",
        f"{minutes:.1f}",
        mean(last(run, "nll_loss", "loss") for run in runs),
        pairs("decoder"),
        pairs("rtd"),
    ]


def accuracies(results: Sequence[Mapping], arm: str, datasets: Sequence[str]) -> list[float]:
    """Percent of each dataset, mean over seeds, and their mean."""
    runs = by_seed(results, arm).values()
    found = [100 * float(np.mean([run[name].mean() for run in runs])) for name in datasets]
    return [*found, float(np.mean(found))]


def difference_row(results, title, first: str, second: str, datasets: Sequence[str]) -> list[str]:
    pair = by_seed(results, first), by_seed(results, second)
    with_pairs = all("blimp" in run for arm in pair for run in arm.values())
    whole = difference(*pair, datasets)
    cells = [difference(*pair, [name]) for name in [*datasets, *["blimp"] * with_pairs]]
    return [
        f"{title[first]} − {title[second]}",
        interval(whole),
        per_seed(whole),
        *map(interval, cells),
        *[""] * (not with_pairs),
    ]


def per_seed(found: Difference | None) -> str:
    return " ".join(f"{value:+.1f}" for value in found.per_seed) if found else ""


def interval(found: Difference | None) -> str:
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]" if found else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|".join(["---"] + ["---:"] * (len(header) - 1))
    return "\n".join(
        [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def draw(plan: Mapping, results: Sequence[Mapping], path: Path) -> None:
    """Left the validation loss of every run over its time, right the accuracy of every seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "evidence"  # the same file for the same results
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    arms = [name for name in plan["arms"] if by_seed(results, name)]
    for number, arm in enumerate(arms):
        runs = [run for run in results if run["arm"] == arm]
        colour, label = f"C{number}", plan["arms"][arm]["title"]
        for run in runs:
            valid = run["valid"].get("nll_loss") or run["valid"].get("loss")
            if valid and not plan["arms"][arm].get("untrained"):
                minutes = np.array(valid[0]) * run["seconds_per_update"] / 60
                left.plot(minutes, valid[1], color=colour, linewidth=0.9, label=label)
                if auxiliary := run["valid"].get("generator_loss"):
                    label = label and f"{label}'s auxiliary model"
                    left.plot(minutes, auxiliary[1], ":", color=colour, linewidth=0.9, label=label)
                label = None
        means = [
            100 * float(np.mean([seed[name].mean() for name in plan["datasets"]]))
            for seed in by_seed(results, arm).values()
        ]
        right.plot([number] * len(means), means, "o", color=colour, alpha=0.6)
        right.plot([number - 0.2, number + 0.2], [np.mean(means)] * 2, color=colour)
    valid = next(run["valid"] for run in results if "unigram_bits" in run.get("valid", {}))
    for name in ("unigram", "bigram", "trigram"):
        bits = valid[f"{name}_bits"][1][-1]
        left.axhline(bits, color="grey", linestyle="--", linewidth=0.6)
        left.text(1, bits, name, fontsize=6, transform=left.get_yaxis_transform(), va="center")
    left.set(xlabel="minutes of one core", ylabel="bits per target token (own validation loss)")
    left.set_title("dashed: n-grams, for the auxiliary models (dotted) alone", fontsize=8)
    left.legend(fontsize=8)
    right.set(ylabel="accuracy, mean of the datasets (%)")
    right.set_xticks(range(len(arms)), [plan["arms"][arm]["title"] for arm in arms], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
