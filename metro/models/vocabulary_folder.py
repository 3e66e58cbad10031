"""The vocabulary of a fairseq checkpoint: find it, check it, build the tokenizer from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metro.data.prepared_folder import PROMPTS_MANIFEST, TEXT_MANIFEST
from metro.data.text.vocabulary import read_vocabulary
from metro.modeling.text_metro_t5 import DICT_FILE, SPM_FILE, VOCABULARY_FILES, Vocabulary
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from metro.utils.files import read_json
from metro.utils.messages import UserError

PADDED_ROWS = 128
"""Upper bound on the padding rows of an embedding, beyond the tokenizer's entries."""


def find_vocabulary(task: Mapping[str, Any], checkpoint: Path) -> Path:
    """Find the folder with ``sp.model`` and ``dict.txt`` of a checkpoint.

    Searches the folders that its task names (``vocab``, then the first of ``data``), as written and
    relative to each folder above the checkpoint, then the checkpoint's own folder.

    Raises:
        UserError: not found, naming the folders searched.
    """
    here = checkpoint.resolve().parent
    named = [str(task[name]).split(":")[0] for name in ("vocab", "data") if task.get(name)]
    folders = []
    for folder in map(Path, named):
        folders += [folder, folder / "train"]
        if not folder.is_absolute():
            folders += [above / folder for above in (here, *here.parents)]
    folders.append(here)
    for candidate in folders:
        if all((candidate / name).is_file() for name in VOCABULARY_FILES):
            return candidate
    raise UserError(
        f"no vocabulary for {checkpoint}: sp.model and dict.txt are neither in "
        f"{' nor in '.join([*named, str(here)])}; name their folder (--vocab DIR, or vocab= in "
        "Python)"
    )


def is_lower(folder: Path, vocabulary: Vocabulary) -> bool:
    """Tell whether the vocabulary is for lowercased text.

    METRO's prepared folders state it. In other folders the vocabulary is taken to be lowercase if
    none of its pieces has a capital letter.
    """
    for name in (TEXT_MANIFEST, PROMPTS_MANIFEST):
        try:
            return bool(read_json(folder / name)["settings"]["lower"])
        except (KeyError, TypeError):
            continue
    return not vocabulary.is_cased


def build_tokenizer(
    folder: str | Path,
    vocab_size: int,
    tokens_per_sample: int | None = None,
    lower: bool | None = None,
) -> MetroT5Tokenizer:
    """Build the tokenizer of a model with ``vocab_size`` embeddings: vocabulary, then sentinels.

    Args:
        folder: has ``sp.model`` and ``dict.txt``.
        vocab_size: rows of the model's embedding.
        tokens_per_sample: number of sentinels in training, if known.
        lower: lowercase texts; by default see :func:`is_lower`.

    Raises:
        UserError: the vocabulary is not the one that the model was trained with.
    """
    folder = Path(folder)
    vocabulary = read_vocabulary(folder)
    num_sentinels = vocab_size - len(vocabulary)
    if num_sentinels < 0 or tokens_per_sample not in (None, num_sentinels):
        sentinels = "" if tokens_per_sample is None else f" and {tokens_per_sample} sentinels"
        raise UserError(
            f"the vocabulary in {folder} has {len(vocabulary)} entries{sentinels}, but the model's "
            f"embedding has {vocab_size} rows: take the sp.model and dict.txt that the model was "
            "trained with"
        )
    return MetroT5Tokenizer(
        str(folder / SPM_FILE),
        str(folder / DICT_FILE),
        lower=is_lower(folder, vocabulary) if lower is None else lower,
        n_sentinel_tokens=num_sentinels,
    )


def check_vocabulary(source: str, rows: int, entries: int) -> None:
    """Allow one embedding per entry, or a few more that pad the vocabulary to a multiple of 8."""
    padded = rows % 8 == 0 and 0 < rows - entries < PADDED_ROWS
    if rows != entries and not padded:
        raise UserError(
            f"{source}: the tokenizer has {entries} entries but config.json says vocab_size {rows}:"
            " sp.model, dict.txt, tokenizer_config.json (n_sentinel_tokens) and config.json must "
            "come from the same model"
        )
