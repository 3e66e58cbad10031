"""The vocabulary that belongs to a fairseq checkpoint: where it lies, and whether it fits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metro.data.prepared_folder import PROMPTS_MANIFEST, TEXT_MANIFEST
from metro.modeling.text_metro_t5 import DICT_FILE, SPM_FILE, VOCABULARY_FILES, Vocabulary
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from metro.utils.messages import UserError


def find_vocabulary(task: Mapping[str, Any], checkpoint: Path) -> Path:
    """The folder with ``sp.model`` and ``dict.txt`` of a checkpoint.

    Looked for in the folders that its task names (``vocab``, then the first of ``data``), as they
    are written and below each folder above the checkpoint, then beside the checkpoint.

    Raises:
        ValueError: in none of these places, naming them.
    """
    here = checkpoint.resolve().parent
    named = [str(task[name]).split(":")[0] for name in ("vocab", "data") if task.get(name)]
    places = []
    for folder in map(Path, named):
        places += [folder, folder / "train"]
        if not folder.is_absolute():
            places += [above / folder for above in (here, *here.parents)]
    places.append(here)
    for place in places:
        if all((place / name).is_file() for name in VOCABULARY_FILES):
            return place
    raise UserError(
        f"no vocabulary for {checkpoint}: sp.model and dict.txt lie neither in "
        f"{' nor in '.join([*named, str(here)])}; name their folder (--vocab DIR, or vocab= in "
        "Python)"
    )


def is_lower(folder: Path, vocabulary: Vocabulary) -> bool:
    """Whether texts are folded to lower case, as METRO's preparation of the data has noted it down.

    Folders of others have no such note: there the pieces tell, which hold capitals or do not.
    """
    for name in (TEXT_MANIFEST, PROMPTS_MANIFEST):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))["settings"]
            return bool(settings["lower"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return not vocabulary.is_cased


def build_tokenizer(
    folder: str | Path,
    vocab_size: int,
    tokens_per_sample: int | None = None,
    lower: bool | None = None,
) -> MetroT5Tokenizer:
    """The tokenizer of a model with ``vocab_size`` embeddings: the vocabulary, then sentinels.

    Args:
        folder: where ``sp.model`` and ``dict.txt`` lie.
        vocab_size: rows of the model's embedding.
        tokens_per_sample: how many sentinels the training had, where that is known.
        lower: fold to lower case; by default as the vocabulary was made.

    Raises:
        ValueError: the vocabulary is not the one that the model was trained with.
    """
    folder = Path(folder)
    vocabulary = Vocabulary.from_folder(folder)
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
