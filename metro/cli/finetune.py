"""`metro finetune`: prompt-finetune a sequence-to-sequence model."""

import click

from metro.cli.options import settings_command
from metro.finetuning.settings import FinetuningSettings, check_sources
from metro.utils.progress import is_first_process


def finetune(settings: FinetuningSettings) -> None:
    """Prompt-finetune a seq2seq model: direct, channel, flipped or direct+ul.

    Run the same command again to resume from the last checkpoint of --output-dir. Several
    processes: torchrun --nproc_per_node N $(which metro) finetune ...
    """
    check_sources(settings)
    from metro.finetuning.run import finetune as run

    result = run(settings)
    if is_first_process():
        click.echo(f"{result.folder}: the model after {result.num_updates} updates")


command = settings_command(
    finetune,
    FinetuningSettings,
    example="metro finetune --model metro_t0_base --data prompts --output-dir finetuned",
    resumes=True,
)
