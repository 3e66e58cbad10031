"""`metro generate`: a model's answers to texts."""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click

from metro.cli.options import settings_command
from metro.generation.settings import GenerationSettings
from metro.utils.characters import refuse_utf16, usable_texts
from metro.utils.messages import UserError
from metro.utils.progress import Progress

PATH = click.Path(path_type=Path)


def generate(
    settings: GenerationSettings,
    model: str,
    texts: tuple[str, ...],
    input: Path | None,
    output: Path | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Let a model answer texts: from the command line, from stdin, or from a file.

    MODEL is a registered name, a hub id, a folder, or a checkpoint .pt; TEXT - reads one text per
    line from stdin. One answer per line, in the order of the texts; an empty line stays empty.
    """
    from metro.data.text.vocabulary import read_vocabulary
    from metro.models.source import model_source, trained_method
    from metro.utils.files import check_output

    source = open_texts(texts, input)
    if output:
        check_output(output, overwrite, (input,) if input else ())
    place = model_source(model)
    if settings.vocab:
        read_vocabulary(settings.vocab)
    method = trained_method(model)
    hub = "" if Path(place).exists() else f" ({place} on the Hugging Face hub)"
    with Progress() as progress, open_output(output, overwrite) as write:
        progress.say(f"loading {model}{hub}")
        if method not in (None, "direct"):
            progress.say(
                f"{model} was trained for method {method}: it writes what is asked, not the "
                "answer; `metro rank` chooses among answers"
            )
        from huggingface_hub.utils import logging as hub_logging

        from metro.generation.answers import answer_texts, load_for_generation, remark_on_cut

        hub_logging.set_verbosity_error()  # without a network it logs every one of its attempts
        loaded = load_for_generation(model, settings)
        num_cut = 0
        for number, answered in enumerate(answer_texts(*loaded, source, settings), start=1):
            num_cut += answered.was_cut
            if as_json:
                write(
                    json.dumps(
                        {"text": answered.text, "answers": answered.answers}, ensure_ascii=False
                    )
                )
            else:
                for answer in answered.answers:
                    write(" ".join(answer.splitlines()))
            if output:
                progress.show("texts answered", number, note=f"{number:,}")
        if num_cut:
            progress.say(remark_on_cut(num_cut, loaded.model, settings))


def open_texts(texts: Iterable[str], path: Path | None) -> Iterator[str]:
    """Iterate over the texts; files and stdin are read as they are needed.

    Raises:
        UserError: there is no text, or one that is not UTF-8, of stdin where it is read.
    """
    if path and texts:
        raise UserError("give texts or --input, not both")
    if path:
        if not path.is_file():
            raise UserError(f"there is no file {path} to read texts from")
        for _ in usable_texts(read_lines(path)):
            pass  # all of them, before the model is loaded
        return read_lines(path)
    if not texts:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("no text: write it behind the model, use --input FILE, or pipe it in")
        texts = ["-"]
    texts = list(usable_texts(texts))
    parts = (
        (line.rstrip("\r\n") for line in sys.stdin) if text == "-" else [text] for text in texts
    )
    return itertools.chain.from_iterable(parts)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file; of a ``.jsonl`` the field ``text`` or ``input``."""
    refuse_utf16(path)
    with open(path, encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\r\n")
                yield text_of(line, path, number) if path.suffix == ".jsonl" else line
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from None


def text_of(line: str, path: Path, number: int) -> str:
    """The text in a line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    text = row.get("text", row.get("input")) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise UserError(f"{path}, line {number} has no text in a field text or input")
    return text


@contextlib.contextmanager
def open_output(path: Path | None, overwrite: bool) -> Iterator[Callable[[str], object]]:
    """A function that writes a line: into a file that appears when it is complete, or to stdout."""
    if path is None:
        yield lambda line: print(line, flush=True)
        return
    from metro.utils.files import new_file

    with new_file(path, overwrite) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield lambda line: file.write(line + "\n")


command = settings_command(
    generate,
    GenerationSettings,
    example='metro generate metro_t0_base "Is the sky blue? Answer yes or no."',
    extra=[
        click.Argument(["model"]),
        click.Argument(["texts"], nargs=-1, metavar="[TEXT]..."),
        click.Option(
            ["--input"], type=PATH, help="One text per line; of a .jsonl the field text or input."
        ),
        click.Option(
            ["--output"], type=PATH, help="Write here, one answer per line, instead of printing."
        ),
        click.Option(
            ["--json", "as_json"],
            is_flag=True,
            help="A JSON object per text, with text and answers.",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace --output."),
    ],
)
