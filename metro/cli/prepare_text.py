"""`metro prepare-text`: text to binarised pretraining data."""

import click

from metro.cli.options import settings_command
from metro.data.settings import PrepareTextSettings


def prepare_text(settings: PrepareTextSettings) -> None:
    """Turn text into the binarised data that pretraining reads.

    Writes train, valid, dict.txt and sp.model into one folder. Run the same command again to
    resume after an interruption.
    """
    from metro.data.text.corpus import prepare_text as prepare
    from metro.data.text.ngrams import NAMES

    result = prepare(settings)
    if result.was_finished:
        return
    counts = result.manifest["counts"]
    unknown = counts["unknown_tokens"] / (counts["train_tokens"] + counts["valid_tokens"])
    click.echo(
        f"{result.folder}: {counts['documents']:,} documents; "
        f"train {counts['train_items']:,} lines, {counts['train_tokens']:,} tokens; "
        f"valid {counts['valid_items']:,} lines, {counts['valid_tokens']:,} tokens; "
        f"vocabulary {counts['vocab_size']:,}; {unknown:.3%} of the tokens unknown"
    )
    if reference := result.manifest.get("reference_bits"):
        lines = ", ".join(f"{name} {reference[name]:.2f}" for name in NAMES)
        click.echo(
            f"bits per held-out token: {lines} (n-grams of {reference['train_tokens']:,} tokens): "
            "a model that uses context is below the bigram"
        )


command = settings_command(
    prepare_text,
    PrepareTextSettings,
    example="metro prepare-text --input books/*.txt --train-vocab 64000 --out data",
    resumes=True,
)
