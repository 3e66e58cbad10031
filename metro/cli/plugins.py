"""`metro plugins`: the folder of METRO's fairseq plugins."""

import importlib.util
from pathlib import Path

import click

from metro.utils.messages import UserError

EXAMPLE = """\b
Example:
  fairseq-hydra-train --config-dir "$(metro plugins --configs)/pretraining" \\
      --config-name metro_t5_tiny common.user_dir="$(metro plugins)" task.data=data/books
"""


@click.command(epilog=EXAMPLE)
@click.option("--configs", is_flag=True, help="Print the folder of the configurations instead.")
def command(configs: bool) -> None:
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
