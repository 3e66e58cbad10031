"""`metro pretrain` and `metro finetune`: train a model."""

import click

from metro.cli.options import settings_command
from metro.finetuning.settings import FinetuningSettings, check_sources
from metro.pretraining.settings import PretrainingSettings
from metro.utils.progress import is_first_process


def pretrain(settings: PretrainingSettings) -> None:
    """Pretrain METRO, or T5 by span corruption, on text of metro prepare-text.

    --config NAME takes a published configuration; options override it. Run the same command again
    to resume from the last checkpoint of --output-dir. Several processes: torchrun
    --nproc_per_node N $(which metro) pretrain ...
    """
    from metro.training.pretrain import pretrain as run

    result = run(settings)
    if is_first_process():
        click.echo(f"{result.folder}: the model after {result.num_updates} updates")


pretrain_command = settings_command(
    pretrain,
    PretrainingSettings,
    example="metro pretrain --config metro_t5_tiny --data data/books --output-dir tiny",
    resumes=True,
)


def finetune(settings: FinetuningSettings) -> None:
    """Prompt-finetune a model on your own rows (--template) or a mixture.

    Run the same command again to resume from the last checkpoint of --output-dir. Several
    processes: torchrun --nproc_per_node N $(which metro) finetune ...
    """
    check_sources(settings)
    from metro.finetuning.run import run_checked as run

    result = run(settings)
    if is_first_process():
        click.echo(f"{result.folder}: the model after {result.num_updates} updates")


command = settings_command(
    finetune,
    FinetuningSettings,
    example="metro finetune --model metro_t0_base --data mails.csv --output-dir mails "
    "\\\n    --template 'What is this mail? {{body}} ||| {{label}}'",
    resumes=True,
)
