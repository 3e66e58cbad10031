"""Entry point of `metro`.

A sub-command is one line of COMMANDS and one file: a function whose annotations typer reads, or a
`typer.Typer` where it has sub-commands of its own. The file is imported only when it is called, so
that `metro --help` stays instant.
"""

import importlib
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

import metro

# name -> (function or typer.Typer, the line that `metro --help` shows)
COMMANDS = {
    "doctor": (
        "metro.cli.doctor:doctor",
        "Show versions, devices and what is missing, with the command that installs it.",
    ),
    "prepare-text": (
        "metro.cli.prepare_text:prepare_text",
        "Turn text into the binarised, sharded data that pretraining reads.",
    ),
    "convert": (
        "metro.cli.convert:app",
        "Convert fairseq checkpoints to Hugging Face folders, and back.",
    ),
    "models": (
        "metro.cli.models:models",
        "List the released METRO-T0, T0 and FLIPPED models and their published results.",
    ),
    "generate": (
        "metro.cli.generate:generate",
        "Let a model answer a text: a released model, a folder or a hub id.",
    ),
    "templates": (
        "metro.cli.templates:app",
        "Fetch the prompt templates of promptsource.",
    ),
    "prompts": (
        "metro.cli.prompts:app",
        "List prompt templates; show what a model will read and be asked for.",
    ),
    "prepare-prompts": (
        "metro.cli.prepare_prompts:prepare_prompts",
        "Turn datasets and prompt templates into finetuning data: T0, T0+, T0++, FLIPPED.",
    ),
    "finetune": (
        "metro.cli.finetune:finetune",
        "Prompt-finetune a seq2seq model: direct, channel or flipped.",
    ),
    "flip": (
        "metro.cli.flip:flip",
        "Show which option makes the instruction most likely, and what each one suggests.",
    ),
    "evaluate": (
        "metro.cli.evaluate:evaluate",
        "Evaluate zero-shot: T0, FLIPPED's 14 sets, BIG-bench, label generalisation, MMLU.",
    ),
    "report": (
        "metro.cli.report:report",
        "Make tables and plots of evaluations, beside the published numbers.",
    ),
}

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError)


class LazyGroup(TyperGroup):
    """Lists the sub-commands of COMMANDS without importing them."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name):
        """A stand-in that knows the help line only; `resolve_command` puts the real one there."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1])

    def resolve_command(self, ctx, args):
        name, stand_in, rest = super().resolve_command(ctx, args)
        if stand_in is None:
            return name, None, rest
        return name, load_command(name), rest


def load_command(name: str):
    """The sub-command as a click command, its function imported now."""
    module, attribute = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), attribute)
    if not isinstance(command, typer.Typer):
        function, command = command, typer.Typer(add_completion=False)
        command.command(name)(function)
    command.rich_markup_mode = None  # rich's tables cut long option names at 80 columns
    return typer.main.get_command(command)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain and finetune T5-style models: METRO, METRO-T0, FLIPPED.",
)


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"metro {metro.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; what a user can put right is one line, not a traceback."""
    try:
        app()
    except USER_ERRORS as error:
        if os.environ.get("METRO_DEBUG"):
            raise
        from rich.console import Console
        from rich.text import Text

        message = f"{error}".strip() or type(error).__name__
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {message}", style="red"))
        sys.exit(2)


if __name__ == "__main__":
    main()
