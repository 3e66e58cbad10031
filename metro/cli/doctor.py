"""`metro doctor`: packages and devices of this machine, and how to install the rest."""

import json

import click


@click.command(epilog="\b\nExample:\n  metro doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show versions, devices and what is missing, with the command that installs it.

    Exit status 1: something that METRO cannot do without is missing or broken.
    """
    from metro.environment import inspect_environment

    environment = inspect_environment()
    if as_json:
        click.echo(json.dumps(environment.as_dict(), indent=2))
    else:
        show(environment)
    raise click.exceptions.Exit(1 if environment.missing else 0)


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
