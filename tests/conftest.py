"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.golden_files import Golden

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Published vocabularies, templates and datasets, which are not part of the project.

    The folder is ``METRO_TESTDATA``, by default ``../shared`` beside the repository.
    """
    folder = Path(os.environ.get("METRO_TESTDATA", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set METRO_TESTDATA to the folder that has them")
    return folder


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Golden:
    """``golden / "masking.json"``: the path of a recorded file."""
    from tests.golden_files import Golden, unpack

    folder = tmp_path_factory.mktemp("golden")
    unpack(folder)
    return Golden(folder)


@pytest.fixture(scope="session")
def original(testdata) -> Path:
    """The whole recording, with what ``tests/golden`` lacks or holds rounded to float16."""
    return testdata / "golden"


@pytest.fixture(scope="session")
def recorded_text(golden, tmp_path_factory) -> Path:
    """Binarised text of the kind that the recorded models were trained on, as pretraining data."""
    from metro.data.text.corpus import prepare_text

    passages = json.loads((golden / "prompt_T0-bin/raw_examples.json").read_text())
    folder = tmp_path_factory.mktemp("recorded_text")
    text = "\n".join(prompt for examples in passages.values() for prompt, _ in examples)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return prepare_text(
        inputs=[folder / "text.txt"],
        out=folder / "data",
        vocab=golden / "tiny_vocab",
        valid_fraction=0,
        num_workers=1,
        progress=False,
    ).folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Invented text."""
    from tests.data.prepared import random_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(0, 3000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocab(text, tmp_path_factory) -> Path:
    """A vocabulary trained on it."""
    from metro.data.text.corpus import prepare_text

    folder = tmp_path_factory.mktemp("vocab") / "vocab"
    return prepare_text(
        inputs=[text], out=folder, train_vocab=150, num_workers=1, progress=False
    ).folder


CHECKPOINTS = ("metro_tiny_a", "metro_tiny_r", "t5_prompt_tiny_f", "t5_tiny_c")
"""Checkpoints in ``tests/golden``."""

RECORDED = ("metro_tiny_a", "metro_tiny_b", "t5_prompt_tiny_f", "t5_tiny_c")
"""Models with exported folders; ``metro_tiny_b`` is in the whole recording alone."""


@pytest.fixture(scope="session")
def exported(golden, tmp_path_factory):
    """``exported(name)``: the folder made of a recorded checkpoint, auxiliary model kept."""
    from metro.conversion.fairseq_to_hf import to_hf

    folder = tmp_path_factory.mktemp("exported")

    def export(name: str) -> Path:
        out = folder / name
        if not out.exists():
            checkpoint = golden / f"checkpoints/{name}.pt"
            to_hf(checkpoint, out, vocab=golden / "tiny_vocab", keep_auxiliary=True)
        return out

    return export


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Prompts as ``metro prepare-prompts`` prepares them, 60 rows of each of two datasets."""
    from tests.finetuning.prepared import write_prepared

    return write_prepared(tmp_path_factory.mktemp("prepared") / "data", 60)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A random T5 of d_model 32 with a tokenizer of its own, as a Hugging Face folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    from tests.finetuning import prepared

    folder = tmp_path_factory.mktemp("t5")
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{k}>" for k in range(8))]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [
        f"{e['input']} {e['target']} input: output: {' '.join(e['answer_choices'])}"
        for _, make, _ in prepared.TASKS.values()
        for e in map(make, range(60))
    ]
    trainer = trainers.WordLevelTrainer(special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=special[3:],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    sizes = dict(vocab_size=tokenizer.get_vocab_size(), d_model=32, d_kv=16, d_ff=64)
    sizes |= dict(num_layers=1, num_heads=2, dropout_rate=0.1, decoder_start_token_id=0)
    config = transformers.T5Config(**sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
