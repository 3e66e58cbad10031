"""`metro finetune`: prompt-finetune a sequence-to-sequence model.

Its options are the fields of `FinetuningSettings`, so that they are described once.
"""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from metro.finetuning.settings import FinetuningSettings, check_sources


def finetune(config: Path | None = None, **given) -> None:
    """Prompt-finetune a seq2seq model: direct, channel, flipped or direct+ul.

    Started again, it goes on from the last checkpoint of --output-dir. Several processes: torchrun
    --nproc_per_node N $(which metro) finetune ...
    """
    settings = FinetuningSettings.combine(config, given)
    check_sources(settings)
    from transformers.utils import logging

    from metro.finetuning.run import finetune as run

    logging.disable_progress_bar()
    try:
        result = run(settings)
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to go on from the last checkpoint")
        raise typer.Exit(130) from None
    typer.echo(f"{result.folder}: the model after {result.num_updates} updates")


def _parameters() -> list[inspect.Parameter]:
    """--config and one option per field; what is not given is None."""
    kinds = get_type_hints(FinetuningSettings)
    about = (
        "YAML file with options of this list (with _ for -), or the name of one that METRO has: "
        f"{', '.join(FinetuningSettings.shipped())}. The command line "
        "comes first."
    )
    options = {"config": Annotated[Path | None, typer.Option(help=about)]}
    for part in fields(FinetuningSettings):
        default = part.default if part.default is not MISSING else None
        if part.default_factory is not MISSING:
            default = ", ".join(map(str, part.default_factory()))
        shown = False if default is None else str(default)
        option = typer.Option(help=part.metadata["help"], show_default=shown)
        options[part.name] = Annotated[kinds[part.name] | None, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, keyword, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]


finetune.__signature__ = inspect.Signature(_parameters())
finetune.__annotations__ = {p.name: p.annotation for p in _parameters()} | {"return": None}
