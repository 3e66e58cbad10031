"""Settings of `metro prepare-text` and `metro.prepare_text`. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from metro.data.text.vocabulary import MIN_VOCAB_SIZE
from metro.utils.messages import UserError
from metro.utils.settings import Settings, option


@dataclass(kw_only=True)
class PrepareTextSettings(Settings):
    """Options of turning text into pretraining data."""

    inputs: list[str] = option(
        help="Text (empty line = new document), .jsonl with a `text` field, .gz of both, or "
        "hf:DATASET[:CONFIG]. Repeat for several; a document ends where an input ends.",
        flag="--input,-i",
        rest="[FILE]...",
    )
    out: Path = option(help="Folder to make, for fairseq-train. It appears when it is complete.")
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
        0.005, "Share of the documents for the validation set; 0: none.", least=0
    )
    overwrite: bool = option(False, "Replace a result made with other settings.")

    def check(self) -> None:
        """Refuse two vocabularies, or none, and a validation set of everything."""
        if (self.vocab is None) == (self.train_vocab is None):
            raise UserError("give a vocabulary: either vocab DIR or train_vocab N")
        if self.valid_fraction >= 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}; use 0 up to less than 1")
