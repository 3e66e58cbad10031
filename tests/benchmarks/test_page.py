"""The page of performance is that of the committed results, and README has no other numbers."""

import copy
import json
import re

import pytest

from benchmarks.evaluation import subject_of
from benchmarks.flipped_training import build_model
from benchmarks.ops import cases
from benchmarks.page import (
    FIGURE,
    PAGE,
    Comparison,
    comparisons,
    read_results,
    render_figure,
    render_page,
    targets,
)
from benchmarks.page_text import age, of_curves, of_ops, precision, sizes, whole_suite, without_amx
from metro.modeling.configuration_metro_t5 import MetroT5Config
from tests.conftest import ROOT


def test_page_and_figure_are_those_of_the_committed_results():
    results = read_results()
    assert PAGE.read_text("utf-8") == render_page(results)
    assert FIGURE.read_text("utf-8") == render_figure(comparisons(results))


@pytest.mark.parametrize("subject", [key for key, x in read_results().items() if x["rows"]])
def test_a_changed_result_changes_the_page(subject):
    """Of every committed file."""
    results = read_results()
    for row in results[subject]["rows"]:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                row[key] = value * 3 + 1
    assert PAGE.read_text("utf-8") != render_page(results)


def test_comparisons_are_ratios_of_what_they_show():
    """Oracle: by hand; FLIPPED's speeds are of processor time, as the ratios are."""
    for each in comparisons(read_results()):
        assert each.times == pytest.approx(each.ours / each.alternative, rel=0.01), each.what


@pytest.mark.parametrize(
    "what, times, floor, memory, verdicts",
    [
        ("FLIPPED training, METRO-T5", 8.0, 1.5, 1.0, ["8 x met"]),
        ("FLIPPED training, METRO-T5", 5.0, 2.0, 1.0, ["8 x not met"]),
        ("FLIPPED training, METRO-T5", 5.0, 1.5, 1.0, ["8 x not met (at the floor 7.5)"]),
        *[
            (
                "METRO-base pretraining, bf16",
                times,
                None,
                memory,
                [speed, f"0.35 of the memory {m}"],
            )
            for times, speed in ((4.0, "3.5 x met"), (3.0, "3.5 x not met"))
            for memory, m in ((0.35, "met"), (0.4, "not met"), (None, "not met"))
        ],
        ("Hugging Face tokenizer", 3.0, None, None, []),
    ],
)
def test_each_target_is_judged_by_itself(what, times, floor, memory, verdicts):
    """Oracle: by hand; at the floor METRO would be times * floor as fast as the published way."""
    assert Comparison(what, times, 1.0, "x", times, floor, memory).verdicts == verdicts


def test_targets_are_counted_and_those_missed_are_named():
    slow = Comparison("METRO-base pretraining, bf16", 3.0, 1.0, "x", 3.0, None, 0.3)
    fast = Comparison("FLIPPED training, METRO-T5", 9.0, 1.0, "x", 9.0, None, None)
    want = "Targets on a CPU with AMX: 2 of 3 met.** Not met: METRO-base pretraining, bf16: 3.5 x."
    assert targets({}, [slow, fast]) == f"**{want}\n"
    on_gpu = {"ops_gpu": {"targets": ["a: 3: met", "b: 2: NOT met"]}}
    assert "**Targets on a GPU: 1 of 2 met**" in targets(on_gpu, [slow, fast])


def gpu_results(results: dict[str, dict]) -> dict[str, dict]:
    """As the GPU suite writes them, from the CPU's committed ones."""
    found = {f"{key}_gpu": copy.deepcopy(results[key]) for key in ("pretraining", "evaluation")}
    found["ops_gpu"] = copy.deepcopy(results["ops"])
    found["pretraining_gpu"]["targets"] = ["tokens/s: 1e+06, target >= 250,000: met"]
    for row in found["pretraining_gpu"]["rows"][:2]:
        padded = row | {"padding": "half to full", "tokens/s": 1.0}
        found["pretraining_gpu"]["rows"].append(padded)
    found["evaluation_gpu"]["targets"] = ["direct, whole suite: 2 x: NOT met"]
    curves = {"losses": {"fused": [9.0, 3.25]}, "failures": ["the keys differ"], "rows": []}
    curves |= {"size": "base", "batch_size": 8}
    found["pretraining_curves_gpu"] = curves
    check = [{"operation": "attention", "type": "float16", "fault": "it is wrong", "seconds": 1.0}]
    found["self_check"] = {"rows": check}
    for subject, result in found.items():
        gpu = {"name": "NVIDIA H100", "capability": "9.0"}
        machine = results["ops"]["environment"] | {"gpus": [gpu]}
        result |= {"subject": subject, "date": "2027-01-01", "environment": machine}
    return found


def test_results_of_a_gpu_get_onto_the_page(tmp_path):
    """With the suite's summary, which is no benchmark's, beside them; and part by part."""
    is_cpu = {key: not key.endswith("_gpu") and key != "self_check" for key in read_results()}
    of_cpu = {key: result for key, result in read_results().items() if is_cpu[key]}
    of_gpu = gpu_results(of_cpu)
    for subject, result in (of_cpu | of_gpu).items():
        (tmp_path / f"{subject}.json").write_text(json.dumps(result))
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"ok": True, "parts": {}}))
    page = render_page(read_results(tmp_path))
    assert "On a GPU nothing has been measured" in render_page(of_cpu)
    assert "On a GPU nothing has been measured" not in page
    assert "On a GPU both compute in bf16." in page and "METRO-base in bf16 with an opt" in page
    assert "| METRO-base pretraining on a GPU | bf16 | 59.1 | 38.9 |" in page
    assert "| evaluation on T0's sets, direct on a GPU | bf16 |" in page
    assert "**Targets on a GPU: 1 of 2 met**" in page
    for line in (
        "## Pretraining on a GPU\n\n2027-01-01, NVIDIA H100, torch",
        "- tokens/s: 1e+06, target >= 250,000: met\n",
        "| metro | half to full | 1 |",
        "- direct, whole suite: 2 x: NOT met\n",
        "NOT so: the keys",
        "| fused | 9 | 3.25 |",
        "## Operations on a GPU",
        "| attention | float16 | it is wrong | 1 |",
    ):
        assert line in page
    for subject, result in of_gpu.items():
        result["rows"] = result["rows"][:1]
        assert render_page(of_cpu | {subject: result}) != render_page(of_cpu)


def test_older_results_and_another_model_are_said_to_be_so():
    """Oracle: by hand, of results that differ in nothing else."""

    def said(date: str, width: int) -> str:
        both = {"layers": 1, "prompts_per_task": 1, "rows_per_task": 2, "width": 64}
        results = {"evaluation": both | {"date": date}}
        results["evaluation_without_amx"] = both | {"date": "2026-11-02", "width": width}
        return age(results) + without_amx(results)

    assert "evaluation, 2026-11-01." in said("2026-11-01", 64)
    assert "older" not in said("2026-11-02", 64) + said("2026-11-03", 64)
    assert "not of the same model" not in said("2026-11-01", 64)
    assert "not of the same model as above but of 1 + 1 layers of width 128" in " ".join(
        said("2026-11-02", 128).split()
    )
    small = read_results()["evaluation_6_384_without_amx"]
    whole = whole_suite(small)
    small_too = " ".join(without_amx({small["subject"]: small}).split())
    assert f"{whole['bf16_speedup']:.3g} times in bf16, which misses the target" in small_too
    assert whole["bf16_speedup"] < 8
    assert age({"evaluation": {"date": "2026-11-01"}}) == ""


@pytest.mark.parametrize(
    "where, why", [("", ""), ("plain float32", ", twice what rounding does to the plain one")]
)
def test_curves_say_what_was_allowed(where, why):
    result = {"size": "small", "batch_size": 4, "failures": [], "loss_differences": {"T5": 2e-7}}
    result |= {"losses": {"fused": [1.0], where: [1.0]}, "relative_difference": 1e-5}
    said = " ".join(of_curves(result | {"allowed": 1e-4}).split())
    assert f"Fused and plain differ by 1e-05 at most; 0.0001 may be{why}. The loss" in said
    assert "one step of T5 in float32 and that of the published way are apart by 2e-07" in said


def test_what_is_projected_is_named_so():
    page, rows = PAGE.read_text("utf-8"), read_results()["evaluation"]["rows"]
    assert "| whole suite, projected |" in page and "| whole suite |" not in page
    measured = sum(row["examples"] for row in rows if row["task"] not in ("all", "whole suite"))
    differ = sum(row["bf16_different"] for row in rows if row["task"] not in ("all", "whole suite"))
    assert f"| {differ} of {measured:,} |" in page


@pytest.mark.parametrize("subject", ["evaluation_without_amx", "evaluation_6_384_without_amx"])
def test_an_evaluation_is_stored_under_the_name_of_its_size(subject):
    """So that the command that the page names for one size leaves the other's results alone."""
    result = read_results()[subject]
    assert f"{subject_of(result['layers'], result['width'])}_without_amx" == subject


def test_sizes_are_those_of_the_code():
    config, text = MetroT5Config(), " ".join(sizes(read_results()).split())
    layers = f"{config.num_layers} + {config.num_decoder_layers} layers"
    assert f"{layers} of width {config.d_model}, and the 4 layers of METRO's" in text
    for kind in ("METRO-T5", "T5 v1.1"):
        config = build_model(kind)[0].config
        layers = f"{config.num_layers} + {config.num_decoder_layers} layers"
        assert f"**FLIPPED:** {layers} of width {config.d_model}," in text


def test_operations_under_old_names_are_said_to_be_old():
    rows = [{"operation": name, "of floor": 0.5} for name in cases("cpu")]
    assert "older" not in of_ops({"rows": rows}) and "exceeds" not in of_ops({"rows": rows})
    rows[0] = {"operation": "attention, of old", "of floor": 1.2}
    said = " ".join(of_ops({"rows": rows}).split())
    assert f"older than the benchmark: 1 of their {len(rows)} cases" in said
    assert "Where a share exceeds 1 the floor is wrong" in said


def test_what_precision_gives_is_what_its_docstring_says():
    """Of one product: five to seven times with AMX, twice with AVX512_BF16."""
    said = " ".join(precision(read_results()).split())
    low, high, other = map(
        float,
        re.search(r"product was (\S+) to (\S+) times .* AMX, and (\S+) times with", said).groups(),
    )
    assert (round(low), round(high), round(other)) == (5, 7, 2)


def test_readme_has_no_speed_that_the_page_has_not():
    text = (ROOT / "README.md").read_text("utf-8")
    speeds = re.findall(r"(\d[\d.,]*) (?:times (?:as fast|the speed)|tokens/s|x )", text)
    assert set(speeds) <= set(re.findall(r"\d[\d.,]*", PAGE.read_text("utf-8")))
