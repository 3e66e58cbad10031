"""Entry point of `metro`.

A sub-command is one line of COMMANDS and a `click.Command` in a module of this folder, which is
imported only when it is called, so that `metro --help` stays instant.
"""

import errno
import importlib
import os
import platform
import sys
from importlib import metadata

import click

import metro
from metro.utils.messages import UserError

# name -> (its module here and the name there, the line that `metro --help` shows), in the order
# text -> model -> numbers
COMMANDS = {
    "doctor": (
        "doctor:command",
        "Show versions, devices and what is missing, with the command that installs it.",
    ),
    "prepare-text": (
        "prepare_text:command",
        "Turn text into the binarised, sharded data that pretraining reads.",
    ),
    "plugins": (
        "doctor:plugins",
        "Print the folder of METRO's fairseq plugins, which pretrain models.",
    ),
    "convert": (
        "convert:command",
        "Convert fairseq checkpoints to Hugging Face folders, and back.",
    ),
    "models": (
        "models:command",
        "List the released METRO-T0, T0 and FLIPPED models and their published results.",
    ),
    "generate": (
        "generate:command",
        "Let a model answer a text: a released model, a folder or a hub id.",
    ),
    "templates": (
        "prompts:templates",
        "Fetch the prompt templates of promptsource.",
    ),
    "prompts": (
        "prompts:command",
        "List prompt templates; show what a model will read and be asked for.",
    ),
    "prepare-prompts": (
        "prepare_prompts:command",
        "Turn datasets and templates into finetuning data: T0, T0+, T0++, FLIPPED.",
    ),
    "finetune": (
        "finetune:command",
        "Prompt-finetune a seq2seq model: direct, channel or flipped.",
    ),
    "flip": (
        "flip:command",
        "Show which answer choice makes the instruction most probable.",
    ),
    "evaluate": (
        "evaluate:command",
        "Evaluate zero-shot: T0, FLIPPED's 14 sets, BIG-bench, label generalisation, MMLU.",
    ),
    "report": (
        "report:command",
        "Make tables and plots of evaluations, beside the published numbers.",
    ),
}

REMEDIES = {
    errno.ENOENT: "does not exist: correct the path",
    errno.EACCES: "may not be read or written by you: change its permissions or use another path",
    errno.EPERM: "may not be changed by you: use another path",
    errno.EISDIR: "is a folder: name a file",
    errno.ENOTDIR: "is not a folder: name a folder",
    errno.EEXIST: "exists already: use another path",
    errno.ENOSPC: "cannot be written, the disk is full: make room or use another disk",
    errno.EDQUOT: "cannot be written, your quota is used up: make room or use another disk",
    errno.EFBIG: "cannot be written, it is larger than the file system or `ulimit -f` allows",
    errno.EROFS: "is on a read-only file system: use another path",
    errno.ENAMETOOLONG: "has too long a name: use a shorter one",
    errno.ENOTEMPTY: "is not empty: use another path",
    errno.EXDEV: "is on another file system: keep inputs and outputs on one",
}
"""Remedy for a path by the error number of the operating system."""


class LazyGroup(click.Group):
    """Group that lists the sub-commands of COMMANDS without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Make a stand-in that has the help line only; `resolve_command` imports the real one."""
        if cmd_name not in COMMANDS:
            return None
        return click.Command(cmd_name, short_help=COMMANDS[cmd_name][1])

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


@click.group(cls=LazyGroup, no_args_is_help=True)
@click.version_option(metro.__version__, message="metro %(version)s")
def app() -> None:
    """Pretrain and finetune T5-style models: METRO, METRO-T0, FLIPPED.

    From text to a model (prepare-text, fairseq with the plugins, convert), from the model to a
    prompted one (prepare-prompts, finetune), from that to numbers (evaluate, report).
    """


def main() -> None:
    """Run the command line; an error that a user can correct is one line, not a traceback."""
    try:
        status = app.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        status = 130
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("METRO_DEBUG"):
            import traceback

            traceback.print_exc()
        click.secho(f"error: {line}" if line else fault(), fg="red", err=True)
        status = 2 if line else 1
    sys.exit(status if isinstance(status, int) else 0)


def one_line(error: Exception) -> str | None:
    """Word an error that the user can correct; None for a fault of METRO's."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        path = error.filename2 or error.filename
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return f"{path if isinstance(path, str) else 'an output file'} {REMEDIES[error.errno]}"
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or torch and isinstance(error, torch.OutOfMemoryError):
        return "out of memory: use smaller batches, or fewer processes"
    return None


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
