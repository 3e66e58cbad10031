"""Write docs/performance.md and its figure from the JSON of the benchmarks.

    python -m benchmarks.page

Every number of the page stands in `benchmarks/results`; a test compares the two.
"""

import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT

PAGE, FIGURE = ROOT / "docs/performance.md", ROOT / "docs/images/performance.svg"

INTRO = """\
# Performance

<!-- written by `python -m benchmarks.page` from benchmarks/results/*.json -->

How fast METRO is, beside the way the published code does the same work: both ran in one
benchmark, on the same cores, and were checked to compute the same. The floor is the time of the
products alone that no way can do without, at the speed of one large product measured in the same
run, of bf16 in the rows of bf16 and of float32 in the others; where a cell is empty, none was
measured. "At the floor" is how many times as fast as the published way it would be: no way in that
type is faster. On a GPU nothing has been measured yet.

"""
AFTER_FIGURE = """
![Times as fast as the published way](images/performance.svg)

## Precision

On a CPU, products of bfloat16 are several times as fast as those of float32 where it has AMX
(Intel's server CPUs since Sapphire Rapids), and twice as fast with AVX512_BF16 (AMD's since Zen 4).
`metro pretrain` and `metro finetune` use them there by autocast for models of width 256 and more
(`--precision auto`, the default, and the log says so): weights, sums, LayerNorm and the optimizer
stay in float32, attention's scores are rounded. CPU features decide, not a measurement, so that a
machine always trains the same way; `--precision fp32` turns it off, `bf16` demands it. On other
CPUs `auto` is float32. fairseq has switches of its own (`--bf16` rounds the weights as well).

`metro evaluate`, `rank`, `generate` and `flip` have the same switch, which there is the type of
weights and products (`--dtype` is another name for it). Their default on a CPU is float32 on
every machine: published numbers are compared with to a tenth of a point, and a rounded score can
turn a close decision.

## Memory of a CPU

On Linux METRO has PyTorch ask for memory in pages of 2 MB (`THP_MEM_ALLOC_ENABLE=1`, which `import
metro` sets unless you did): most systems give them only to those who ask, and in pages of 4 kB the
processor can spend much time on looking addresses up, most of all in a virtual machine beside
others. That changes no result. The plain ways below have them off, as PyTorch by default, but for
the rows that say so.

While it trains, METRO has glibc give the memory of tensors of 4 MiB and more back when they are
freed (unless you set `MALLOC_MMAP_THRESHOLD_`). By itself glibc keeps what is below 32 MiB, in
pieces that the next update can only partly use: METRO-base in bf16 took a quarter more memory.

"""


TARGETS = {
    "METRO-base pretraining, bf16": 3.5,
    "T5-base spans, bf16": 2.0,
    "evaluation on T0's sets, direct": 8.0,
    "evaluation on T0's sets, direct, bf16": 8.0,
    "FLIPPED training, METRO-T5": 8.0,
    "FLIPPED training, METRO-T5, bf16": 8.0,
}
"""What METRO aims at: times as fast as the published way."""
MEMORY_TARGETS = {"METRO-base pretraining, bf16": 0.35}
"""Shares of the published way's peak memory."""


class Section(NamedTuple):
    """A table of the page: the rows of one file, with some of their columns."""

    subject: str
    title: str
    columns: tuple[str, ...]
    module: str = ""
    """Of benchmarks, where it has another name than the subject."""


BY_WIDTH = ("width", "fp32 s", "bf16 s", "times as fast")
SECTIONS = (
    Section("precision", "A METRO step by width, with AMX", BY_WIDTH),
    Section(
        "precision_without_amx",
        "A METRO step by width, with AVX512_BF16",
        BY_WIDTH,
        "precision",
    ),
    Section(
        "precision_curves",
        "Losses of both precisions",
        (
            *("seed", "last losses, fp32", "last losses, bf16", "bf16 / fp32"),
            *("mean difference of an update", "times as fast"),
        ),
    ),
    Section(
        "pretraining",
        "Pretraining at the published size",
        ("way", "tokens/s", "x plain", "of matrix peak", "peak GiB", "of plain"),
    ),
    Section(
        "evaluation",
        "Evaluation",
        (
            *("method", "task", "examples", "published_per_s", "ours_per_s", "speedup"),
            *("times_floor", "largest_difference", "different_predictions"),
            *("bf16_speedup", "bf16_times_floor", "bf16_different"),
        ),
    ),
    Section(
        "flipped_training",
        "FLIPPED training",
        (
            *("model", "way", "examples/s", "times as fast", "by CPU time", "times the floor"),
            *("peak MiB", "loss"),
        ),
    ),
    Section(
        "prepare_text",
        "Text to binarised data",
        ("name", "workers", "input_mb", "seconds", "mb_per_second", "speedup", "peak_memory_mib"),
    ),
    Section(
        "prompt_data",
        "Prompted datasets",
        ("name", "examples", "seconds", "examples_per_second", "speedup", "padding_share"),
    ),
    Section("tokenizer", "Tokenizer", ("stage", "way", "strings per second", "x plain")),
    Section(
        "ops",
        "Operations",
        ("operation", "impl", "ms", "x first", "floor ms", "of floor", "kept MiB"),
    ),
)


class Comparison(NamedTuple):
    """A row of the first table."""

    what: str
    ours: float
    alternative: float
    unit: str
    times: float
    floor: float | None
    """Our time over that of the floor."""
    memory: float | None
    """Our peak over the alternative's."""

    @property
    def at_floor(self) -> float | None:
        """The most times as fast that the floor allows."""
        return self.times * self.floor if self.floor else None

    @property
    def verdict(self) -> str:
        """Whether the targets are reached, or which is not; nothing where there are none."""
        wanted, share = TARGETS.get(self.what), MEMORY_TARGETS.get(self.what)
        if wanted is None:
            return ""
        missed = []
        if self.times < wanted:
            is_beyond = self.at_floor is not None and self.at_floor < wanted
            missed.append(f"{wanted:g} x" + " (beyond the floor)" * is_beyond)
        if share is not None and (self.memory is None or self.memory > share):
            missed.append(f"{share:g} of the memory")
        if missed:
            return "not reached: " + ", ".join(missed)
        return f"{wanted:g} x" + (f", {share:g} of the memory" if share else "") + ": reached"


def comparisons(results: dict[str, dict]) -> list[Comparison]:
    """What stands first: each benchmark's main row beside its alternative's."""
    found = []
    rows = {row["way"]: row for row in results["pretraining"]["rows"]}
    beside = {"metro": "plain", "metro bf16": "plain"}
    beside |= {"t5 spans": "t5 plain", "t5 spans bf16": "t5 plain"}
    for way, other in beside.items():
        if way in rows and other in rows:
            ours, plain = rows[way], rows[other]
            speeds = ours["tokens/s"], plain["tokens/s"]
            share = ours["of matrix peak"]
            task = "T5-base spans" if way.startswith("t5") else "METRO-base pretraining"
            what = task + ", bf16" * way.endswith("bf16")
            found.append(
                Comparison(what, *speeds, "tokens/s", speeds[0] / speeds[1],
                           1 / share if share else None, ours["peak GiB"] / plain["peak GiB"])
            )  # fmt: skip
    for row in results["evaluation"]["rows"]:
        if row["task"] == "whole suite":
            what = f"evaluation on T0's sets, {row['method']}"
            speeds = row["ours_per_s"], row["published_per_s"]
            floor = row["times_floor"]
            found.append(Comparison(what, *speeds, "examples/s", row["speedup"], floor, None))
            if times := row.get("bf16_speedup"):
                speeds = speeds[1] * times, speeds[1]
                floor = row.get("bf16_times_floor")
                found.append(Comparison(f"{what}, bf16", *speeds, "examples/s", times, floor, None))
    rows = results["flipped_training"]["rows"]
    published = {row["model"]: row for row in rows if row["way"] == "published"}
    for ours in (row for row in rows if row["way"] != "published"):
        plain = published[ours["model"]]
        speeds = 1 / ours["CPU s/example"], 1 / plain["CPU s/example"]
        memory = ours["peak MiB"] / plain["peak MiB"]
        what = f"FLIPPED training, {ours['model']}{ours['way'].removeprefix('ours')}"
        times, floor = ours["by CPU time"], ours.get("times the floor")
        found.append(Comparison(what, *speeds, "examples/s", times, floor, memory))
    named = (
        ("prepare_text", "metro prepare-text", "mb_per_second", "MB/s"),
        ("prompt_data", "metro prepare-prompts", "examples_per_second", "examples/s"),
    )
    for subject, what, key, unit in named:
        plain, ours = results[subject]["rows"][:2]
        found.append(Comparison(what, ours[key], plain[key], unit, ours["speedup"], None, None))
    ours = results["tokenizer"]["rows"][-1]
    key, times = "strings per second", ours["x plain"]
    speeds = ours[key], ours[key] / times
    found.append(Comparison(ours["stage"], *speeds, "strings/s", times, None, None))
    return found


def shown(value: Any) -> str:
    """A number as people read it; a missing one is an empty cell."""
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(columns: tuple[str, ...], rows: list[list[Any]]) -> str:
    lines = [columns, ("---",) * len(columns), *([shown(x) for x in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def about(result: dict) -> str:
    """Where and when a file was measured."""
    machine = result["environment"]
    versions = {part["name"]: part["version"] for part in machine["parts"]}
    kinds = ", ".join(gpu["name"] for gpu in machine["gpus"]) or machine["cpu"]
    threads = result.get("threads")
    used = f", {threads} of {machine['cores']} cores" if threads else f", {machine['cores']} cores"
    versions = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"{result['date']}, {kinds}{used}, {versions}; `python -m benchmarks.{{}}`."


def render_page(results: dict[str, dict]) -> str:
    """The page; results by subject."""
    columns = ("what", "METRO", "published way", "unit", "times as fast", "times the floor")
    columns += ("at the floor", "share of its memory", "target")
    rows = [[*each[:6], each.at_floor, each.memory, each.verdict] for each in comparisons(results)]
    text = INTRO + table(columns, rows) + AFTER_FIGURE
    for section in SECTIONS:
        if (result := results.get(section.subject)) is None:
            continue
        keys = tuple(key for key in section.columns if any(key in row for row in result["rows"]))
        rows = [[row.get(key) for key in keys] for row in result["rows"]]
        named = tuple(key.replace("_", " ") for key in keys)
        where = about(result).format(section.module or section.subject)
        text += f"## {section.title}\n\n{where}\n\n{table(named, rows)}\n"
    return text.rstrip() + "\n"


def render_figure(found: list[Comparison]) -> str:
    """Bars of times as fast, as SVG."""
    step, left, scale = 26, 300, 380 / max(each.times for each in found)
    height = step * len(found) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="760" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18" fill="#555">times as fast as the published way</text>',
    ]
    for i, each in enumerate(found):
        top, width = step * i + 28, round(each.times * scale, 1)
        parts += [
            f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{escape(each.what)}</text>',
            f'<rect x="{left}" y="{top}" width="{width}" height="18" fill="#3a6ea5"/>',
            f'<text x="{left + width + 6}" y="{top + 13}">{shown(float(each.times))}</text>',
        ]
    line = left + round(scale, 1)
    parts.append(f'<path d="M{line} 24V{height - 4}" stroke="#c33" stroke-dasharray="4 3"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def read_results(folder: Path = ROOT / "benchmarks/results") -> dict[str, dict]:
    """The committed results by subject."""
    files = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json")))
    return {result["subject"]: result for result in files}


def main() -> None:
    results = read_results()
    PAGE.write_text(render_page(results), "utf-8")
    FIGURE.write_text(render_figure(comparisons(results)), "utf-8")
    print(f"written: {PAGE}, {FIGURE}")


if __name__ == "__main__":
    main()
