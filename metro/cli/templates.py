"""`metro templates`: fetch promptsource's templates once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Fetch the prompt templates of promptsource."
)


@app.callback()
def root() -> None:
    pass


@app.command("fetch")
def fetch(
    file: Annotated[
        Path | None,
        typer.Option(help="The source package promptsource-0.2.3.tar.gz, downloaded before."),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Package index; default: PIP_INDEX_URL, else PyPI.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Replace what is there.")] = False,
) -> None:
    """Download promptsource 0.2.3's source package and put its templates into the cache.

    The checksum is pinned, and no code of the package is run. Every command finds them there.
    """
    from metro.data.prompts.template_download import fetch_templates

    fetched = fetch_templates(file=file, index=index, again=again)
    there = " (they were there; --again replaces them)" if fetched.was_there else ""
    print(f"{fetched.folder}: templates of {fetched.num_files} datasets{there}")
