"""`metro doctor` and `metro plugins`: packages, devices and folders of this machine."""

import importlib.util
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click

from metro.utils.messages import UserError


@click.command(epilog="\b\nExample:\n  metro doctor data/books")
@click.argument("folders", nargs=-1, metavar="[FOLDER]...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """Show versions, devices and what is missing, with the command that installs it.

    With FOLDERs, check their files instead, every byte: of prepare-text and prepare-prompts, of
    exported and finetuned models with their checkpoints, of evaluations, and fairseq's checkpoints.

    On a GPU every Triton kernel computes a small example beside PyTorch's operations.

    Exit status 1: something that METRO cannot do without is missing or broken.
    """
    if folders:
        damage = {str(folder): damaged_files(folder) for folder in folders}
        lines = [line for name, bad in damage.items() for line in bad or [f"{name}: ok"]]
        click.echo(json.dumps(damage, indent=2) if as_json else "\n".join(lines))
        raise click.exceptions.Exit(1 if any(damage.values()) else 0)
    from metro.environment import inspect_environment

    environment = inspect_environment()
    reason, kernels = try_kernels(environment)
    if as_json:
        found = {"kernels": kernels, "kernels_reason": reason}
        click.echo(json.dumps(environment.as_dict() | found, indent=2))
    else:
        show(environment)
        show_kernels(reason, kernels)
    raise click.exceptions.Exit(1 if environment.missing else 0)


def damaged_files(folder: Path) -> list[str]:
    """List what is damaged in a folder that METRO or fairseq wrote.

    Raises:
        UserError: nothing there has checksums.
    """
    from metro.evaluation.runs.run_folder import check_run
    from metro.utils.checksums import RECORDS, check_archive, damage

    def check(path: Path) -> Iterator[str]:
        if path.name in RECORDS:
            yield from damage(path.parent)
        elif path.name == "run.json":
            check_run(path.parent)
        else:
            check_archive(path)

    kinds = (*RECORDS, "run.json", "*.pt", "*.pth")
    found: list[str] = []
    paths = [path for kind in kinds for path in sorted(folder.rglob(kind))]
    for path in paths:
        try:
            found += check(path)
        except UserError as error:
            found.append(str(error))
        except zipfile.BadZipFile as error:
            found.append(f"{path} was damaged: {error}")
    if not paths:
        raise UserError(
            f"nothing in {folder} has checksums: name a folder that `metro prepare-text`, "
            "`prepare-prompts`, `convert`, `finetune` or `evaluate` made, or fairseq's checkpoints"
        )
    return found


def show(environment) -> None:
    """Print the environment for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"METRO {environment.metro}, Python {environment.python}, {environment.platform}")
    console.print(
        f"CPU   {environment.cpu}, {environment.cores} cores, {environment.memory_gib} GiB memory, "
        f"{environment.disk_free_gib} GiB disk free here",
        soft_wrap=True,
    )
    for gpu in environment.gpus:
        console.print(
            f"GPU   {gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}, "
            f"CUDA {environment.cuda}"
        )
    if not environment.gpus and not any(part.name == "torch" for part in environment.missing):
        built_for = f"CUDA {environment.cuda}" if environment.cuda else "CPU"
        console.print(f"GPU   none (torch is built for {built_for})")

    table = Table("part", "version", "used for", "state", box=None, pad_edge=False)
    for part in environment.parts:
        if part.error is None:
            state = "[green]ok[/]"
        else:
            colour = "red" if part.required else "yellow"
            state = f"[{colour}]{escape(part.error)}[/]"
        table.add_row(part.name, part.version or "-", escape(part.purpose), state)
    console.print(table)

    for note in environment.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    to_install = [part for part in environment.parts if part.install]
    if to_install:
        console.print("\nTo install what is missing:")
        for part in to_install:
            need = "required" if part.required else "optional"
            console.print(f"  {part.install}   # {part.name}, {need}", markup=False, soft_wrap=True)
    if environment.missing:
        names = ", ".join(part.name for part in environment.missing)
        console.print(f"[red]METRO cannot run: {names}[/]")


def try_kernels(environment) -> tuple[str, list[dict]]:
    """Let the first GPU's kernels prove themselves; why none can run there, or what was found.

    Raises:
        UserError: the environment's METRO_TRITON is neither 0 nor 1.
    """
    if not environment.gpus:
        return "no GPU", []
    import torch

    from metro.ops.dispatch import reason_against_device

    device = torch.device("cuda", 0)
    if reason := reason_against_device(device):
        return reason, []
    from metro.ops.kernels.trials import verdicts

    try:
        return "", list(verdicts(device))
    except ValueError as error:
        raise UserError(str(error)) from None


def show_kernels(reason: str, rows: list[dict]) -> None:
    """Print which kernels work, and in how many of their cases they are used."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if reason:
        console.print(f"kernels: none is used: {reason}")
        return
    table = Table("kernel", "type", "result", "used", box=None, pad_edge=False)
    for row in rows:
        cases = f"yes, in {len(row['used'])} cases" if row["used"] else f"no, {row['reason']}"
        table.add_row(row["operation"], row["type"], escape(row["fault"] or "ok"), cases)
    console.print(table)


EXAMPLE = """\b
Example:
  fairseq-hydra-train --config-dir "$(metro plugins --configs)/pretraining" \\
      --config-name metro_t5_tiny common.user_dir="$(metro plugins)" \\
      task.data=data/books
"""


@click.command(epilog=EXAMPLE)
@click.option("--configs", is_flag=True, help="Print the folder of the configurations instead.")
def plugins(configs: bool) -> None:
    """Print the folder of METRO's fairseq plugins, for fairseq's --user-dir."""
    click.echo(plugins_folder() / "configs" if configs else plugins_folder())


def plugins_folder() -> Path:
    """Find the package fairseq_plugins without importing it, and fairseq with it.

    Raises:
        UserError: it is not installed beside METRO.
    """
    spec = importlib.util.find_spec("fairseq_plugins")
    if spec is None or spec.origin is None:
        raise UserError(
            "the package fairseq_plugins, which comes with METRO, is not installed; install METRO "
            "again, or add the checkout to PYTHONPATH"
        )
    return Path(spec.origin).parent
