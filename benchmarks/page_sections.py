"""The tables of docs/performance.md that stand below the first one."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import page_text


class Section(NamedTuple):
    """A table of the page: the rows of one file, with some of their columns."""

    subject: str
    title: str
    columns: tuple[str, ...]
    module: str = ""
    """Of benchmarks, where it has another name than the subject."""
    note: Callable[[dict], str] | None = None
    """What stands above the table."""
    rows: Callable[[dict], list[dict]] = lambda result: result["rows"]


def evaluation_rows(result: dict) -> list[dict]:
    """The rows, with what of them is projected, and predictions out of those that were measured."""
    rows = []
    for row in result["rows"]:
        row = dict(row)
        if row["task"] == "whole suite":
            measured, _ = page_text.measured_and_whole(result["rows"])
            row["task"] = "whole suite, projected"
            for key in ("different_predictions", "bf16_different"):
                if key in row:
                    row[key] = f"{row[key]:,} of {measured:,}"
        rows.append(row)
    return rows


def compiled_rows(result: dict) -> list[dict]:
    """Needs before and after."""
    before = {row["kernel"]: row for row in result["before"]["rows"]}

    def cell(row: dict, key: str) -> str:
        old = before[row["kernel"]][key]
        return f"{old:,} → {row[key]:,}" if old != row[key] else f"{old:,}"

    keys = {"registers": "registers", "stack": "stack bytes", "shared": "shared bytes"}
    keys["copies"] = "asynchronous copies"
    return [
        {"kernel": row["kernel"]} | {name: cell(row, key) for key, name in keys.items()}
        for row in result["rows"]
    ]


def curve_rows(result: dict) -> list[dict]:
    """First and last loss of each curve."""
    return [
        {"run": run, "first loss": losses[0], "last loss": losses[-1]}
        for run, losses in result["losses"].items()
    ]


BY_WIDTH = ("width", "fp32 s", "bf16 s", "times as fast")
PRETRAINING = ("way", "padding", "tokens/s", "x plain", "of matrix peak", "peak GiB", "of plain")
EVALUATION = (
    *("method", "task", "examples", "published_per_s", "ours_per_s", "speedup"),
    *("times_floor", "largest_difference", "different_predictions"),
    *("bf16_speedup", "bf16_times_floor", "bf16_different", "bf16_largest_difference"),
)
FLIPPED = (
    *("model", "way", "examples/s", "times as fast", "by CPU time", "times the floor"),
    *("peak MiB", "loss"),
)
BY_PART = ("job", "METRO in", "part", "seconds", "share", "in products s", "floor s")
OPERATIONS = ("operation", "impl", "ms", "x first", "floor ms", "of floor", "kept MiB")
SECTIONS = (
    Section(
        "product_precision",
        "A product by precision",
        ("precision", "GFLOP/s", "times as fast", "relative error"),
    ),
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
            "mean difference of an update",
        ),
        note=page_text.of_precision_curves,
    ),
    Section(
        "pretraining",
        "Pretraining at the published size, with AMX",
        PRETRAINING,
        note=page_text.of_pretraining,
    ),
    Section(
        "pretraining_without_amx",
        "Pretraining at the published size, with AVX512_BF16",
        PRETRAINING,
        "pretraining",
        page_text.of_pretraining,
    ),
    Section(
        "pretraining_gpu",
        "Pretraining on a GPU",
        PRETRAINING,
        "pretraining",
        page_text.of_gpu_pretraining,
    ),
    Section(
        "pretraining_curves",
        "Losses on a CPU",
        ("run", "first loss", "last loss"),
        note=page_text.of_curves,
        rows=curve_rows,
    ),
    Section(
        "pretraining_curves_gpu",
        "Losses on a GPU",
        ("run", "first loss", "last loss"),
        "pretraining_curves",
        page_text.of_curves,
        curve_rows,
    ),
    Section(
        "evaluation",
        "Evaluation, with AMX",
        EVALUATION,
        note=page_text.of_evaluation,
        rows=evaluation_rows,
    ),
    Section(
        "evaluation_without_amx",
        "Evaluation, with AVX512_BF16",
        EVALUATION,
        "evaluation",
        page_text.of_evaluation,
        evaluation_rows,
    ),
    Section(
        "evaluation_6_384_without_amx",
        "Evaluation of a smaller model, with AVX512_BF16",
        EVALUATION,
        "evaluation --layers 6 --width 384 --rows 96",
        page_text.of_evaluation,
        evaluation_rows,
    ),
    Section(
        "evaluation_gpu",
        "Evaluation on a GPU",
        EVALUATION,
        "evaluation",
        page_text.of_gpu_evaluation,
        evaluation_rows,
    ),
    Section("flipped_training", "FLIPPED training, with AMX", FLIPPED, note=page_text.of_flipped),
    Section(
        "flipped_training_without_amx",
        "FLIPPED training, with AVX512_BF16",
        FLIPPED,
        "flipped_training",
        page_text.of_flipped,
    ),
    Section(
        "time_by_part",
        "Where the time goes, with AMX",
        BY_PART,
        note=page_text.of_time_by_part,
    ),
    Section(
        "time_by_part_without_amx",
        "Where the time goes, with AVX512_BF16",
        BY_PART,
        "time_by_part",
        page_text.of_time_by_part,
    ),
    Section("startup", "Start-up", ("command", "CPU seconds"), note=page_text.of_startup),
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
    Section("ops", "Operations", OPERATIONS, note=page_text.of_ops),
    Section("ops_gpu", "Operations on a GPU", (*OPERATIONS, "peak MiB", "timed"), "ops"),
    Section("self_check", "Kernels tried on a GPU", ("operation", "type", "fault", "seconds")),
    Section(
        "compiled_kernels",
        "Compiled kernels",
        ("kernel", "registers", "stack bytes", "shared bytes", "asynchronous copies"),
        note=page_text.of_compiled,
        rows=compiled_rows,
    ),
)
