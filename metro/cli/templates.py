"""`metro templates`: fetch promptsource's templates once."""

from pathlib import Path

import click


@click.group()
def command() -> None:
    """Fetch the prompt templates of promptsource."""


@command.command(epilog="\b\nExample:\n  metro templates fetch")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="The source package promptsource-0.2.3.tar.gz, downloaded before.",
)
@click.option("--index", help="Package index; default: PIP_INDEX_URL, else PyPI.")
@click.option("--again", is_flag=True, help="Replace existing templates.")
def fetch(file: Path | None, index: str | None, again: bool) -> None:
    """Download promptsource 0.2.3's source package and put its templates into the cache.

    The checksum is pinned, and no code of the package is run. Every command finds them there.
    """
    from metro.data.prompts.template_download import fetch_templates

    fetched = fetch_templates(file=file, index=index, again=again)
    note = " (present before; --again replaces them)" if fetched.was_there else ""
    click.echo(f"{fetched.folder}: templates of {fetched.num_files} datasets{note}")
