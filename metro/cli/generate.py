"""`metro generate`: a model's answers to texts."""

import contextlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from metro.utils.messages import UserError

SECONDS_OF_SILENCE = 20
"""While answers go into a file, a line on stderr after so many seconds."""


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A registered name, a hub id, a folder, or a checkpoint .pt."),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="- reads one text per line from stdin."),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="One text per line; of a .jsonl the field text or input."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write here, one answer per line, instead of printing.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object per text, with text and answers.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer.", show_default="256, or the model's positions"),
    ] = None,
    max_input_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 512,
    sentinels: Annotated[
        bool,
        typer.Option("--sentinels", help="Read <sen001> in a text as that sentinel, not as text."),
    ] = False,
    num_beams: Annotated[int, typer.Option(help="Beam search; 1 is greedy.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams; more favours longer.")] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="Never repeat so many tokens.")] = 0,
    sample: Annotated[bool, typer.Option("--sample", help="Draw instead of the best.")] = False,
    temperature: Annotated[float, typer.Option(help="Of --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Of --sample: the k best tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Of --sample: tokens of this much mass.")] = 1.0,
    num_answers: Annotated[int, typer.Option(help="Answers per text, of beams or samples.")] = 1,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts at once.")] = 8,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16.", show_default="float32; bfloat16 on a GPU"),
    ] = None,
    vocab: Annotated[
        Path | None,
        typer.Option(help="Folder with sp.model and dict.txt, for a checkpoint .pt."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output.")] = False,
) -> None:
    """Let a model answer texts: from the command line, from stdin, or from a file.

    One answer per line, in the order of the texts; an empty line stays empty.
    """
    from metro.modeling.text_metro_t5 import Vocabulary
    from metro.models.source import model_source
    from metro.utils.files import check_output

    source = open_texts(texts or [], input)
    if output:
        check_output(output, overwrite)
    place = model_source(model)
    if vocab:
        Vocabulary.from_folder(vocab)
    hub = "" if Path(place).exists() else f" ({place} on the Hugging Face hub)"
    print(f"loading {model}{hub}", file=sys.stderr, flush=True)
    from metro.models.generation import GenerationSettings, answer_texts  # seconds, for torch

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, max_input_tokens=max_input_tokens, num_beams=num_beams,
        num_answers=num_answers, length_penalty=length_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size, sample=sample, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed, batch_size=batch_size, sentinels=sentinels,
    )  # fmt: skip
    loaded = load_quietly(model, device, dtype, vocab)

    num_cut, told = 0, time.monotonic()
    with open_output(output, overwrite) as write:
        for number, answered in enumerate(answer_texts(*loaded, source, settings)):
            num_cut += answered.was_cut
            if output and time.monotonic() - told > SECONDS_OF_SILENCE:
                told = time.monotonic()
                print(f"{number:,} texts answered", file=sys.stderr, flush=True)
            if as_json:
                write(json.dumps({"text": answered.text, "answers": answered.answers},
                                 ensure_ascii=False))  # fmt: skip
            else:
                for answer in answered.answers:
                    write(" ".join(answer.splitlines()))
    if num_cut:
        print(
            f"note: {num_cut} of the texts were cut: --max-input-tokens is {max_input_tokens}"
            + limit_of_positions(loaded.model, max_input_tokens),
            file=sys.stderr,
        )


def open_texts(texts: list[str], path: Path | None):
    """The texts, as an iterator; files and stdin are read as they are needed."""
    if path and texts:
        raise UserError("give texts or --input, not both")
    if path:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} to read texts from")
        return unicode_alone(read_lines(path))
    if not texts:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("no text: write it behind the model, use --input FILE, or pipe it in")
        texts = ["-"]
    parts = [lines_of_stdin() if text == "-" else [text] for text in texts]
    return unicode_alone(itertools.chain.from_iterable(parts))


def unicode_alone(texts):
    """The same texts; bytes that are no UTF-8 come through pipes and arguments as surrogates."""
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = text[error.start : error.end]
            raise UserError(f"text {number} is not UTF-8 (it holds {bad!r})") from None
        yield text


def lines_of_stdin():
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def read_lines(path: Path):
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\r\n")
                yield text_of(line, path, number) if path.suffix == ".jsonl" else line
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from None


def text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    text = row.get("text", row.get("input")) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise UserError(f"{path}, line {number} has no text in a field text or input")
    return text


def load_quietly(name: str, device: str | None, dtype: str | None, vocab: Path | None):
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    import metro

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}); try --device cpu") from None
    if dtype is None:
        fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if fast else "float32"
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # without a network it tells of every one of its attempts
    return metro.load(name, device=device, dtype=dtype, vocab=vocab)


def limit_of_positions(model, max_input_tokens: int) -> str:
    positions = getattr(model.config, "max_positions", None)
    if positions and positions < max_input_tokens:
        return f", and the model has {positions} positions"
    return ""


@contextlib.contextmanager
def open_output(path: Path | None, overwrite: bool):
    """A function that writes a line: into a file that appears when it is complete, or to stdout."""
    if path is None:
        yield lambda line: print(line, flush=True)
        return
    from metro.utils.files import new_file

    with new_file(path, overwrite) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield lambda line: file.write(line + "\n")
