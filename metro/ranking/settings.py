"""Settings of `metro rank`, `metro.rank` and `metro.Ranker`. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from metro.data.settings import check_options
from metro.evaluation.settings import ScoringSettings
from metro.utils.messages import UserError
from metro.utils.settings import option

FORMATS = (".csv", ".jsonl", ".parquet")


@dataclass(kw_only=True)
class RankSettings(ScoringSettings):
    """Options of ranking."""

    model: str = option(
        help="Registered name, hub id, folder, adapter or .pt file.",
        positional=True,
        metavar="MODEL",
    )
    input: str | None = option(
        None, "FILE.csv, .jsonl, .parquet, ..., a FILE.txt of lines, or a dataset of the hub."
    )
    text: str | None = option(None, "Field of --input that holds the text.")
    options: list[str] | None = option(
        None, 'Labels to choose from: --options complaint question "a praise".', many=True
    )
    template: list[str] | None = option(
        None, "Jinja text around the text: 'What is this mail? {{text}}'; several are averaged."
    )
    out: Path | None = option(None, "FILE.csv, .jsonl or .parquet; default: print.")
    prompt: list[str] | None = option(
        None,
        "Instead of --template: DATASET:NAME of `metro prompts`, or all of DATASET.",
        section="Input and output",
    )
    options_field: str | None = option(None, "Field of --input that holds each row's own labels.")
    options_file: Path | None = option(None, "File of labels, one per line.")
    subset: str | None = option(None, "Of a dataset of the hub.")
    split: str | None = option(None, "Of a dataset of the hub, or of a folder.")
    overwrite: bool = option(False, "Replace --out.")

    def check(self) -> None:
        """Refuse options that do not fit together."""
        self.method_of(self.model)
        given = [n for n in ("options", "options_field", "options_file") if getattr(self, n)]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} both say what to choose from: give one")
        if self.template and self.prompt:
            raise UserError("template and prompt both say how to ask: give one")
        if self.options is not None:
            check_options(self.options, "options")
        if self.options_file is not None and not self.options_file.is_file():
            raise UserError(f"there is no file {self.options_file} of options")
        if self.out is not None and self.out.suffix not in FORMATS:
            raise UserError(f"out is {self.out}; use a name that ends in {', '.join(FORMATS)}")

    def fixed_options(self) -> list[str] | None:
        """Labels that are the same for all texts; None where each row or the template has its own.

        Raises:
            UserError: the file of labels has fewer than two, or one twice.
        """
        if self.options_file is None:
            return self.options
        try:
            lines = self.options_file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.options_file} is not UTF-8 ({error}): write it again") from None
        found = [line.strip() for line in lines if line.strip()]
        check_options(found, str(self.options_file))
        return found
