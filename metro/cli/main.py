"""Entry point of `metro`.

A sub-command is a line of GROUPS and a `click.Command` in a module of this folder, which is
imported only when it is called, so that `metro --help` stays instant.
"""

import gc
import importlib
import os
import platform
import signal
import sys
from importlib import metadata

import click

import metro
from metro.utils.messages import one_line
from metro.utils.progress import LIFE

GROUPS = {
    "Text to data": {
        "prepare-text": (
            "prepare_text:command",
            "Turn text into the binarised data that pretraining reads.",
        ),
        "templates": ("prompts:templates", "Fetch the prompt templates of promptsource."),
        "prompts": ("prompts:command", "List prompt templates; show what a model will read."),
        "prepare-prompts": (
            "prepare_prompts:command",
            "Turn datasets and templates into finetuning data.",
        ),
    },
    "Data to a model": {
        "pretrain": (
            "finetune:pretrain_command",
            "Pretrain METRO, or T5 by span corruption, on text.",
        ),
        "plugins": ("doctor:plugins", "Print the folder of the plugins to pretrain with fairseq."),
        "convert": ("convert:command", "Convert fairseq checkpoints to Hugging Face, and back."),
        "finetune": ("finetune:command", "Prompt-finetune a model: direct, channel or flipped."),
        "models": ("models:command", "List the released models and their published results."),
    },
    "A model to answers and numbers": {
        "generate": ("generate:command", "Let a model answer a text."),
        "rank": ("rank:command", "Choose a label for each of your texts, with probabilities."),
        "flip": ("flip:command", "Show which choice makes an instruction most probable."),
        "evaluate": ("evaluate:command", "Measure zero-shot: T0's tasks, MMLU, ..., or your rows."),
        "report": (
            "evaluate:report_command",
            "Make tables and plots, beside the published numbers.",
        ),
    },
    "This machine": {
        "plan": ("models:plan_command", "Show what fits on your GPUs, with which options."),
        "doctor": ("doctor:command", "Show versions, devices, and how to install what is missing."),
    },
}
"""The path text -> model -> numbers, as `metro --help` shows it.

Heading -> name of a command -> its module here and the name there, its line.
"""
COMMANDS = {name: about for group in GROUPS.values() for name, about in group.items()}


class LazyGroup(click.Group):
    """Group that lists the sub-commands of COMMANDS without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Make a stand-in; `resolve_command` imports the real one."""
        if cmd_name not in COMMANDS:
            return None
        return click.Command(cmd_name, short_help=COMMANDS[cmd_name][1])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, (_, line) in group.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)) if stand_in else None, rest


def load_command(name: str) -> click.Command:
    """Import the module of a sub-command."""
    module, attribute = COMMANDS[name][0].split(":")
    command: click.Command = getattr(importlib.import_module(f"metro.cli.{module}"), attribute)
    command.name = name
    return command


@click.group(
    cls=LazyGroup,
    no_args_is_help=True,
    epilog="\b\nExample:\n  metro rank metro_t0_base --options good bad < texts.txt",
)
@click.version_option(metro.__version__, message="metro %(version)s")
def app() -> None:
    """Pretrain, finetune and evaluate T5-style models: METRO, METRO-T0, FLIPPED."""


def main() -> None:
    """Run the command line; an error that a user can correct is one line, not a traceback."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with LIFE:
            status = app.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        status = 128 + signal.SIGINT
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("METRO_DEBUG"):
            import traceback

            traceback.print_exc()
        click.secho(f"error: {line}" if line else fault(), fg="red", err=True)
        status = 2 if line else 1
    gc.freeze()  # the process ends: searching all modules for garbage would take most of a second
    sys.exit(status if isinstance(status, int) else 0)


def interrupt(signum: int, frame: object) -> None:
    """Handle SIGTERM like Ctrl-C: temporary files are removed. A second one ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt


def fault() -> str:
    """Word the line below the traceback of an error that is not the user's."""
    versions = [f"metro {metro.__version__}", f"python {platform.python_version()}"]
    for name in ("torch", "transformers"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return (
        f"This is a fault of METRO's, not of yours: please report it with the lines above and "
        f"these versions: {', '.join(versions)}."
    )


if __name__ == "__main__":
    main()
