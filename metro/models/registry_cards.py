"""Model cards of the registered checkpoints, written from the registry alone."""

from pathlib import Path

from metro.models.registry import RegisteredModel, registered_models, show_parameters
from metro.utils.files import write_text
from metro.utils.messages import UserError

TASK_TITLES = {
    "rte": "RTE",
    "cb": "CB",
    "anli_r1": "ANLI R1",
    "anli_r2": "ANLI R2",
    "anli_r3": "ANLI R3",
    "wsc": "WSC",
    "winogrande": "Winogrande XL",
    "copa": "COPA",
    "story_cloze": "StoryCloze 2016",
    "hellaswag": "HellaSwag",
    "wic": "WiC",
    "piqa": "PIQA",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "OpenbookQA",
}
SUITE_TITLES = {
    "t0": "T0 Eval",
    "flipped14": "FLIPPED's 14 sets",
    "bigbench": "BIG-bench",
    "label_generalization": "Label generalisation",
    "mmlu": "MMLU",
    "blimp": "BLiMP",
}
EXAMPLE = (
    "Is this review positive or negative? Review: this is the best cast iron skillet you will ever "
    "buy"
)


class ResultTable:
    """Published results of a model on one suite, with a column per source."""

    def __init__(self, model: RegisteredModel, suite: str):
        self.title = SUITE_TITLES[suite]
        tables = [table for table in model.published if table["suite"] == suite]
        self.sources = [table["source"] for table in tables]
        self._columns = [table["results"] for table in tables]
        tasks = dict.fromkeys(task for column in self._columns for task in column)
        self.rows = [
            (
                TASK_TITLES.get(task, task),
                *(show_percent(column.get(task)) for column in self._columns),
            )
            for task in tasks
        ]

    @property
    def mean_title(self) -> str:
        return f"mean of {len(self.rows)}"

    @property
    def means(self) -> list[str]:
        """Mean of each column that has all tasks of the table, ``-`` for the others."""
        return [
            show_percent(sum(column.values()) / len(column))
            if len(column) == len(self.rows)
            else "-"
            for column in self._columns
        ]


def show_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def result_tables(model: RegisteredModel) -> list[ResultTable]:
    suites = dict.fromkeys(table["suite"] for table in model.published)
    return [ResultTable(model, suite) for suite in suites]


def facts_of(model: RegisteredModel) -> list[tuple[str, str]]:
    """List the facts that `metro models NAME` and the card show, as (label, text)."""
    return [
        ("hub id", model.hub_id),
        ("parameters", f"{model.parameters:,} ({show_parameters(model.parameters)})"),
        ("vocabulary", model.vocabulary),
        ("pretraining", model.pretraining),
        ("finetuning", model.finetuning),
        ("evaluated by", model.method.upper()),
        ("paper", model.paper),
        ("licence", model.licence),
    ]


def write_card(model: RegisteredModel) -> str:
    """Format the model card in Markdown."""
    lines = [f"# {model.title}", ""]
    lines += ["Written from `registry.yaml` by `metro models --write-cards`; do not edit.", ""]
    lines += ["| | |", "|---|---|"]
    facts = [("name here", f"`{model.name}`"), *facts_of(model)]
    lines += [f"| {name} | {text} |" for name, text in facts]
    lines += ["", "## Use", "", "```sh", *_commands(model), "```", ""]
    lines += ["```python", "import metro", "", f'model, tokenizer = metro.load("{model.name}")']
    lines += ["```", "", "## Published results", "", "Accuracy in percent, mean over prompts."]
    for table in result_tables(model):
        lines += ["", f"### {table.title}", ""]
        lines += ["| | " + " | ".join(table.sources) + " |"]
        lines += ["|---|" + "---:|" * len(table.sources)]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        lines += [f"| {table.mean_title} | " + " | ".join(table.means) + " |"]
    return "\n".join(lines) + "\n"


def _commands(model: RegisteredModel) -> list[str]:
    if model.family == "flipped":
        review = "this is the best cast iron skillet you will ever buy"
        return [
            f'metro flip {model.name} --input "<extra_id_0> {review}<extra_id_1>" \\',
            '  --instruction "<extra_id_0> Title: <extra_id_1> Review:" \\',
            "  --options Positive Negative",
            f'metro generate {model.name} "input: {review} output: Positive"',
            f"metro evaluate {model.name} --suite flipped14 --out results",
        ]
    return [
        f'metro generate {model.name} "{EXAMPLE}"',
        f"metro evaluate {model.name} --suite t0 --out results",
    ]


def write_cards(folder: str | Path) -> list[Path]:
    """Write ``<name>.md`` of every registered model into an existing folder."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; create it first")
    written = []
    for model in registered_models().values():
        written.append(Path(folder) / f"{model.name}.md")
        write_text(written[-1], write_card(model))
    return written
