"""Settings of `metro evaluate` and `metro.evaluate`. Nothing heavy is imported here."""

import re
from dataclasses import dataclass
from pathlib import Path

from metro.data.prompts.encoding import TRUNCATION_SIDES
from metro.data.prompts.instruction import INSTRUCTION_TEXTS, SENTINEL
from metro.data.settings import TEMPLATE_HELP, OwnRowsSettings
from metro.evaluation.tasks.label_generalization import LABEL_WORDS
from metro.evaluation.tasks.protocol import PROTOCOLS
from metro.models.placement import PlacementSettings
from metro.models.registry import METHODS
from metro.models.source import trained_method
from metro.utils.files import file_name
from metro.utils.messages import UserError
from metro.utils.settings import PRECISION_FLAGS, Settings, option

NORMALIZATIONS = ("sum", "mean", "calibrated")
PAIR_METHODS = ("decoder", "rtd")
"""Of minimal pairs; see ``metro.evaluation.scoring.minimal_pairs``."""


@dataclass(kw_only=True)
class ScoringSettings(PlacementSettings):
    """Options of scoring answer choices with a model."""

    normalization: str = option(
        "sum",
        "sum (published), mean (per token), or calibrated.",
        choices=NORMALIZATIONS,
        section="Scores",
    )
    method: str | None = option(
        None, "Default: the method the model was trained for.", choices=METHODS
    )
    protocol: str | None = option(
        None, "Special tokens and lengths; default: the model's.", choices=tuple(PROTOCOLS)
    )
    templates: Path | None = option(None, "A promptsource tree; default: the one that was fetched.")
    instruction_text: str = option("published", "For method flipped.", choices=INSTRUCTION_TEXTS)
    max_source_length: int | None = option(None, "Tokens; default: the model family's.", least=3)
    max_target_length: int | None = option(None, "Tokens; default: the model family's.", least=3)
    truncation_side: str = option(
        "right", "right: longer sources lose their end; left: beginning.", choices=TRUNCATION_SIDES
    )
    vocab: Path | None = option(
        None, "Vocabulary folder of a fairseq checkpoint.", section="Model and device"
    )
    dtype: str = option(
        "fp32",
        "Of weights and products: fp32, bf16, fp16, auto (as saved), fast (bf16 or fp32).",
        flag=PRECISION_FLAGS,
    )
    attention: str | None = option(
        None, "Implementation; default: the model's.", choices=("sdpa", "eager")
    )
    batch_tokens: int | None = option(
        None, "Tokens of a batch; changes speed and memory only.", least=1
    )
    seed: int = option(0, "Of templates that draw at random.")

    def method_of(self, model: str) -> str:
        """The method that a model's answer choices are scored with.

        Raises:
            UserError: the normalization does not suit it.
        """
        method = self.method or trained_method(model) or "direct"
        if self.normalization == "calibrated" and method == "channel":
            raise UserError(
                "calibrated scores compare an answer choice with and without the input; "
                "channel scores are probabilities of the input: use sum or mean"
            )
        return method


@dataclass(kw_only=True)
class EvaluationSettings(ScoringSettings, OwnRowsSettings):
    """Options of an evaluation."""

    models: list[str] = option(
        help="Registered names, hub ids, Hugging Face folders, fairseq checkpoints (.pt).",
        positional=True,
        metavar="MODEL...",
    )
    suite: str = option(
        "t0",
        "t0, flipped14, bigbench, label_generalization, mmlu, blimp, FILE.yaml, prepared prompts.",
    )
    data: str | None = option(None, "Own rows instead of a suite: FILE, FOLDER, the hub's.")
    template: list[str] | None = option(None, TEMPLATE_HELP)
    out: Path = option("results", "A folder per run is made in it.")
    method: str | None = option(
        None,
        "Default: the method the model was trained for; of minimal pairs: all it can.",
        choices=(*METHODS, *PAIR_METHODS),
    )
    limit: int | None = option(None, "Rows of each task, evenly spread.", least=1)
    tasks: list[str] | None = option(
        None, "Only this task; may be repeated.", flag="--task", section="Tasks"
    )
    prompts: list[str] | None = option(None, "Only this prompt; may be repeated.", flag="--prompt")
    split: str | None = option(None, "Instead of the suite's split.")
    data_dir: Path | None = option(None, "Local rows: DATASET/SUBSET/SPLIT.jsonl (csv, ...).")
    bigbench_dir: Path | None = option(
        None, "<task>/task.json of BIG-bench; default: bigbench in --data-dir."
    )
    label_words: str = option("words", "For label_generalization.", choices=LABEL_WORDS)
    run_name: str | None = option(
        None, "The run's folder in --out; default: MODEL-METHOD-SUITE.", section="Run"
    )
    check_published: bool = option(
        False, "Fail if a registered model misses its published accuracy."
    )
    tolerance: float = option(1.0, "Percentage points per task for --check-published.", least=0)
    overwrite: bool = option(False, "Delete a run of the same name instead of resuming it.")

    def check(self) -> None:
        """Refuse options that do not fit together, and run folders that would be shared."""
        self.check_own_rows(self.data)
        if self.data is not None and not self.asks_own_rows:
            raise UserError(
                "data needs a template: --template 'What is this? {{text}} ||| {{label}}'"
            )
        if self.data is not None and self.suite != "t0":
            raise UserError(f"data and suite {self.suite} are two tasks: give one")
        if not self.models:
            raise UserError("no model to evaluate: name at least one")
        if self.run_name and len(self.models) > 1:
            raise UserError("run_name names one run, but there are several models; leave it out")
        if self.run_name and (Path(self.run_name).name != self.run_name or self.run_name == ".."):
            raise UserError(f"run_name is {self.run_name!r}; use a name without slashes")
        if self.check_published and self.limit is not None:
            raise UserError("check_published needs all rows: leave limit out")
        folders: dict[str, str] = {}
        for name in self.models:
            folder = self.folder_name(name, "SUITE")
            if folder in folders:
                raise UserError(
                    f"models {folders[folder]} and {name} would share the run folder {folder}; "
                    "evaluate them one at a time, each with a run_name of its own"
                )
            folders[folder] = name

    def folder_name(self, model: str, suite: str) -> str:
        """Name of a run's folder on the suite of this name."""
        name = f"{short_name(model)}-{self.method_of(model)}"
        return self.run_name or f"{name}-{file_name(suite, keep_case=True)}"


GENERIC = r"(?i)direct|channel|flipped|hf|export(ed)?|model|final|checkpoint.*|.*\.pt"
"""Names of models that say little without the folder that they are in."""


def short_name(model: str) -> str:
    """Name a folder for a model: last part of its path or hub id, of generic ones the last two."""
    path = Path(model)
    if path.name in ("", ".."):
        path = path.resolve()
    parts = path.parts[-2 if re.fullmatch(GENERIC, path.name) else -1 :]
    name = "_".join(parts).removesuffix(".pt")
    return file_name(re.sub(r"[ /]+", "_", name).strip("._"), keep_case=True)


@dataclass(kw_only=True)
class ReportSettings(Settings):
    """Options of a report."""

    runs: list[Path] = option(
        help="Run folders of `metro evaluate`, or folders that hold some.",
        positional=True,
        metavar="RUN...",
    )
    out: Path = option("report", "Folder to write into.")
    published: list[str] = option(
        ["all"], "Published rows to show: all, none, or names of `metro models`."
    )
    suite: str | None = option(None, "Only the runs of this suite.")
    title: str | None = option(None, "Heading of the report.")


@dataclass(kw_only=True)
class FlipSettings(PlacementSettings):
    """Options of FLIPPED on one input."""

    model: str = option(
        help="Registered name, hub id, folder or .pt file.", positional=True, metavar="MODEL"
    )
    input: str = option(
        help="The input instance; <extra_id_0>, <extra_id_1>... for the instruction."
    )
    options: list[str] = option(
        help='Answer choices; --options "Positive" "Negative", or --options twice.',
        many=True,
    )
    instruction: str | None = option(
        None,
        'The instruction, "<extra_id_0> Title: <extra_id_1> Review:"; without it the instruction '
        "that each answer choice suggests decides.",
    )
    vocab: str | None = option(None, "Vocabulary folder of a fairseq checkpoint.")
    dtype: str = option(
        "fp32",
        "Of weights and products: fp32, bf16, fp16, auto (as saved), fast (bf16 or fp32).",
        flag=PRECISION_FLAGS,
    )
    device: str | None = option(None, "cpu, cuda, cuda:1; default: cpu.")
    max_new_tokens: int = option(64, "Of the generated instructions.", least=1)

    def check(self) -> None:
        """Refuse texts that are empty, and a single option."""
        if not self.input.strip():
            raise UserError("--input is empty; give the text that the options are about")
        if len(self.options) < 2:
            raise UserError(f"--options has {len(self.options)}; give at least two to choose from")
        if self.instruction is not None and not SENTINEL.sub("", self.instruction).strip():
            raise UserError(
                f"--instruction is {self.instruction!r}: without text beside sentinels; leave it "
                "out"
            )
        if not all(each.strip() for each in self.options):
            raise UserError("one of --options is empty; give a text")
