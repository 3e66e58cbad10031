"""Settings of `metro prepare-text` and `metro prepare-prompts`, and those of rows of one's own.

Nothing heavy is imported here.
"""

from dataclasses import dataclass
from pathlib import Path

from metro.data.prompts.instruction import INSTRUCTION_TEXTS
from metro.modeling.text_metro_t5 import NUM_SPECIAL_IDS
from metro.utils.messages import UserError
from metro.utils.settings import Settings, option

MIN_VOCAB_SIZE = NUM_SPECIAL_IDS + 2  # and [MASK], and one character


@dataclass(kw_only=True)
class PrepareTextSettings(Settings):
    """Options of turning text into pretraining data."""

    inputs: list[str] = option(
        help="Text (empty line = new document), .jsonl with a `text` field, .gz of both, a folder "
        "of these, or hf:DATASET[:CONFIG]. Repeat for several; a document ends where a file ends.",
        flag="--input,-i",
        many=True,
    )
    out: Path = option(help="Folder to make, for pretraining. It appears when it is complete.")
    vocab: Path | None = option(None, "Folder with sp.model and dict.txt.")
    train_vocab: int | None = option(
        None,
        "Train a vocabulary of N ids on the input.",
        metavar="N",
        least=MIN_VOCAB_SIZE,
    )
    cased: bool = option(False, "Keep capitals, or lowercase.", flag="--cased/--uncased")
    num_workers: int | None = option(
        None, "Processes; default: all cores.", flag="--workers", least=1
    )
    valid_fraction: float = option(
        0.005,
        "Share of the documents (of shard 0) for the validation set; 0: none.",
        least=0,
        below=1,
    )
    shards: int | None = option(
        None, "Cut the corpus into N folders, one per epoch in turn.", metavar="N", least=1
    )
    shard: int | None = option(
        None,
        "Make shard K alone, 0 to N-1, as on one of many machines; then run it without --shard.",
        metavar="K",
        least=0,
    )
    overwrite: bool = option(False, "Replace a result made with other settings.")

    def check(self) -> None:
        """Refuse two vocabularies, or none, and a shard that is not one."""
        if (self.vocab is None) == (self.train_vocab is None):
            raise UserError("give a vocabulary: either vocab DIR or train_vocab N")
        if self.shard is not None and self.shard >= (self.shards or 0):
            raise UserError(
                f"shard is {self.shard} and shards is {self.shards}: use shards N, shard 0 to N-1"
            )


@dataclass(kw_only=True)
class PreparePromptsSettings(Settings):
    """Options of turning datasets and prompt templates into finetuning data."""

    mixture: str = option(
        help="t0, t0p, t0pp, t0_train_eval, flipped, or a FILE.yaml.", flag="--mixture,-m"
    )
    out: Path | None = option(None, "Folder to make. It appears when it is complete.")
    vocab: Path | None = option(None, "Folder with sp.model and dict.txt: makes ids, for fairseq.")
    data_dir: Path | None = option(
        None, "Local rows, DIR/DATASET/SUBSET/SPLIT.jsonl (or csv, ...), not the hub's."
    )
    limit: int | None = option(
        None, "At most N rows of a dataset and side, spread evenly.", metavar="N", least=1
    )
    templates: Path | None = option(
        None,
        "promptsource tree; default: METRO_TEMPLATES, else the fetched one.",
        section="Mixture",
    )
    datasets: list[str] | None = option(
        None,
        "Only this dataset of the mixture, as super_glue/rte; repeatable.",
        flag="--dataset",
    )
    source: str = option(
        "templates", "p3: prompts that bigscience/P3 has rendered.", choices=("templates", "p3")
    )
    validation: str = option(
        "published",
        "Tasks to validate on: published, all of the mixture, or none.",
        choices=("published", "all", "none"),
    )
    valid_limit: int | None = option(
        None, "The same for validation; default: --limit.", metavar="N", least=1
    )
    seed: int = option(0, "Of templates that draw at random.")
    instruction_text: str = option(
        "published",
        "FLIPPED: published, or rendered (without branches not taken).",
        choices=INSTRUCTION_TEXTS,
    )
    format: str | None = option(
        None, "Default: fairseq if there is a --vocab.", choices=("fairseq", "jsonl"), section="Run"
    )
    cased: bool = option(False, "Keep capitals, or lowercase (fairseq).", flag="--cased/--uncased")
    num_workers: int | None = option(
        None, "Processes; default: all cores.", flag="--workers", least=1
    )
    overwrite: bool = option(False, "Replace a result made with other settings.")


TEMPLATE_HELP = "Ask about rows: '{{body}} What is it? ||| {{label}}'."


@dataclass(kw_only=True)
class OwnRowsSettings(Settings):
    """Options that make prompts of rows of one's own."""

    template: list[str] | None = option(None, TEMPLATE_HELP)
    input_field: str | None = option(
        None, "Field of the text, where there is no --template.", section="Own rows"
    )
    target_field: str | None = option(None, "Field of the answer, where no template has one.")
    options: list[str] | None = option(
        None, "Answers to choose from; default: the values of the answer's field.", many=True
    )
    subset: str | None = option(None, "Of a dataset of the hub.")
    split_field: str | None = option(None, "Field that names the split of each row.")

    @property
    def asks_own_rows(self) -> bool:
        """Whether the options say how to ask about rows."""
        return bool(self.template or self.input_field)

    def check_own_rows(self, data: str | None) -> None:
        """Refuse options of own rows that do not fit together.

        Args:
            data: where the rows are.
        """
        if self.options is not None:
            check_options(self.options, "options")
        if self.template and self.input_field:
            raise UserError("template and input_field both say how to ask: give one")
        if self.input_field and not self.target_field:
            raise UserError("target_field is missing: name the field of the answer")
        for name in ("target_field", "options", "subset", "split_field"):
            if getattr(self, name) is not None and not self.asks_own_rows:
                raise UserError(f"{name} is for rows of your own: add template or input_field")
        if self.asks_own_rows and data is None:
            raise UserError("template asks about rows: name them with data")


def check_options(options: list[str], where: str) -> None:
    """Refuse labels of which nothing can be chosen, or that cannot be told apart."""
    if len(options) < 2:
        raise UserError(f"{where} has {len(options)} labels; give at least two to choose from")
    if not all(each.strip() for each in options):
        raise UserError(f"{where} has an empty label; give a text")
    folded = [" ".join(each.split()) for each in options]
    if twice := next((each for each in folded if folded.count(each) > 1), None):
        raise UserError(f"{where} has {twice!r} twice; give each label once")
    if bad := next((each for each in options if "|||" in each), None):
        raise UserError(f"{where} has {bad!r}: write it without |||, which separates labels")
