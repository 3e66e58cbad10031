"""Write docs/performance.md and its figure from the JSON of the benchmarks.

    python -m benchmarks.page

Every number of the page stands in `benchmarks/results`; a test compares the two.
"""

import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import page_text
from benchmarks.common import ROOT
from benchmarks.page_sections import SECTIONS, Section

PAGE, FIGURE = ROOT / "docs/performance.md", ROOT / "docs/images/performance.svg"

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

    on_gpu: bool = False

    @property
    def verdicts(self) -> list[str]:
        """A line for each target, which says whether it is met."""
        lines = []
        if wanted := TARGETS.get(self.what):
            line = f"{wanted:g} x {'met' if self.times >= wanted else 'not met'}"
            if self.at_floor is not None and self.at_floor < wanted:
                line += f" (at the floor {shown(self.at_floor)})"
            lines.append(line)
        if share := MEMORY_TARGETS.get(self.what):
            is_met = self.memory is not None and self.memory <= share
            lines.append(f"{share:g} of the memory {'met' if is_met else 'not met'}")
        return lines


def pretraining_comparisons(result: dict, on_gpu: bool = False) -> list[Comparison]:
    rows = {row["way"]: row for row in result["rows"] if row.get("padding", "none") == "none"}
    beside = {"metro": "plain", "metro bf16": "plain"}
    beside |= {"t5 spans": "t5 plain", "t5 spans bf16": "t5 plain"}
    found = []
    for way, other in beside.items():
        if way in rows and other in rows:
            ours, plain = rows[way], rows[other]
            speeds = ours["tokens/s"], plain["tokens/s"]
            floor = 1 / ours["of matrix peak"] if ours["of matrix peak"] else None
            what = "T5-base spans" if way.startswith("t5") else "METRO-base pretraining"
            what += " on a GPU" * on_gpu + ", bf16" * (on_gpu or way.endswith("bf16"))
            memory = ours["peak GiB"] / plain["peak GiB"]
            times = speeds[0] / speeds[1]
            found.append(Comparison(what, *speeds, "tokens/s", times, floor, memory, on_gpu))
    return found


def evaluation_comparisons(result: dict, on_gpu: bool = False) -> list[Comparison]:
    found = []
    for row in result["rows"]:
        if row["task"] == "whole suite":
            what = f"evaluation on T0's sets, {row['method']}" + " on a GPU, bf16" * on_gpu
            ours, plain = row["ours_per_s"], row["published_per_s"]
            given = row["speedup"], row["times_floor"], None, on_gpu
            found.append(Comparison(what, ours, plain, "examples/s", *given))
            if times := row.get("bf16_speedup"):
                floor = row.get("bf16_times_floor")
                given = plain * times, plain, "examples/s", times, floor, None
                found.append(Comparison(f"{what}, bf16", *given))
    return found


def flipped_comparisons(result: dict) -> list[Comparison]:
    """By processor time."""
    found, rows = [], result["rows"]
    published = {row["model"]: row for row in rows if row["way"] == "published"}
    for ours in (row for row in rows if row["way"] != "published"):
        plain = published[ours["model"]]
        speeds = 1 / ours["CPU s/example"], 1 / plain["CPU s/example"]
        memory = ours["peak MiB"] / plain["peak MiB"]
        what = f"FLIPPED training, {ours['model']}{ours['way'].removeprefix('ours')}"
        times, floor = ours["by CPU time"], ours.get("times the floor")
        found.append(Comparison(what, *speeds, "examples/s", times, floor, memory))
    return found


def text_comparisons(results: dict[str, dict]) -> list[Comparison]:
    found = []
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
    return [*found, Comparison(ours["stage"], *speeds, "strings/s", times, None, None)]


def model_comparisons(results: dict[str, dict], machine: str = "") -> list[Comparison]:
    """What models do on a CPU with AMX, or on another machine."""
    found, options = [], {"on_gpu": True} if machine == "_gpu" else {}
    for make in (pretraining_comparisons, evaluation_comparisons, flipped_comparisons):
        subject = make.__name__.removesuffix("_comparisons").replace("flipped", "flipped_training")
        if result := results.get(subject + machine):
            found += make(result, **options)
    return found


def comparisons(results: dict[str, dict]) -> list[Comparison]:
    """What stands first: each benchmark's main row beside its alternative's."""
    of_gpu = model_comparisons(results, "_gpu")
    return of_gpu + model_comparisons(results) + text_comparisons(results)


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
    used = f"torch {versions['torch']}, transformers {versions['transformers']}"
    if "triton" in result:
        where, used = "no GPU", f"Triton {result['triton']}"
    elif machine["gpus"]:
        where = ", ".join(gpu["name"] for gpu in machine["gpus"])
    else:
        threads = f"{result['threads']} of " if "threads" in result else ""
        where = f"{machine['cpu']}, {threads}{machine['cores']} cores"
    return f"{result['date']}, {where}, {used}; `python -m benchmarks.{{}}`."


def first_table(found: list[Comparison]) -> str:
    columns = ("what", "METRO in", "METRO", "published way", "unit", "times as fast")
    columns += ("at the floor", "share of its memory", "targets")
    rows = []
    for each in found:
        what, in_bf16 = each.what.removesuffix(", bf16"), each.what.endswith(", bf16")
        is_model = each.floor is not None or in_bf16
        dtype = ("bf16" if in_bf16 else "float32") if is_model else ""
        speeds = each.ours, each.alternative, each.unit, each.times
        verdict = "; ".join(each.verdicts)
        rows.append([what, dtype, *speeds, each.at_floor, each.memory, verdict])
    return table(columns, rows)


def targets_met(found: list[Comparison], where: str) -> str:
    """How many targets are met, and which are not."""
    judged = [(each.what, line) for each in found for line in each.verdicts]
    missed = [
        f"{what}: {line.replace(' not met', '')}" for what, line in judged if "not met" in line
    ]
    text = f"**Targets on a CPU {where}: {len(judged) - len(missed)} of {len(judged)} met.**"
    if missed:
        text += f" Not met: {'; '.join(missed)}."
    return page_text.filled(text)


def targets(results: dict[str, dict], found: list[Comparison]) -> str:
    """Those with AMX, and how many of a GPU's, which stand in its sections, are met."""
    lines = [targets_met(found, "with AMX")]
    on_gpu = [result for subject, result in results.items() if subject.endswith("_gpu")]
    if of_gpu := [line for result in on_gpu for line in result.get("targets", ())]:
        num_met = sum("NOT met" not in line for line in of_gpu)
        lines.append(f"**Targets on a GPU: {num_met} of {len(of_gpu)} met**, see below.\n")
    return "\n".join(lines)


def render_section(section: Section, result: dict) -> str:
    rows = section.rows(result)
    keys = tuple(key for key in section.columns if any(key in row for row in rows))
    if "padding" in keys and {row["padding"] for row in rows} == {"none"}:
        keys = tuple(key for key in keys if key != "padding")
    named = tuple(key.replace("_", " ") for key in keys)
    text = f"## {section.title}\n\n"
    text += about(result).format(section.module or section.subject) + "\n\n"
    if section.note and (note := section.note(result)):
        text += note + "\n"
    text += "".join(f"- {line}\n" for line in result.get("targets", ()))
    text += "\n" * bool(result.get("targets"))
    return text + table(named, [[row.get(key) for key in keys] for row in rows]) + "\n"


def render_page(results: dict[str, dict]) -> str:
    """The page; results by subject."""
    found = comparisons(results)
    has_gpu = any(subject.endswith("_gpu") for subject in results)
    text = page_text.INTRO + (page_text.ON_GPU if has_gpu else page_text.NO_GPU)
    text += page_text.age(results) + "\n"
    text += f"{first_table(found)}\n{targets(results, found)}\n{page_text.sizes(results)}\n"
    text += page_text.floors(results) + "\n"
    text += "![Times as fast as the published way](images/performance.svg)\n\n"
    if without_amx := model_comparisons(results, "_without_amx"):
        text += f"{page_text.without_amx(results)}\n{first_table(without_amx)}\n"
        text += targets_met(without_amx, "without AMX") + "\n"
    text += page_text.precision(results) + page_text.memory(results)
    for section in SECTIONS:
        if result := results.get(section.subject):
            text += render_section(section, result)
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
    """The committed results by subject; the GPU suite's summary has none."""
    files = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json")))
    return {result["subject"]: result for result in files if "subject" in result}


def main() -> None:
    results = read_results()
    PAGE.write_text(render_page(results), "utf-8")
    FIGURE.write_text(render_figure(comparisons(results)), "utf-8")
    print(f"written: {PAGE}, {FIGURE}")


if __name__ == "__main__":
    main()
