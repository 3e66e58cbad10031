"""`metro flip`: ask a model which option makes an instruction likely."""

import sys
from typing import Annotated

import typer

TIE = 0.001
"""Scores that the table shows alike; an answer by less than that means nothing."""


def flip(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Registered name, hub id, folder or .pt file."),
    ],
    input: Annotated[
        str,
        typer.Option(help="The input instance; <extra_id_0>, <extra_id_1>... for the instruction."),
    ],
    options: Annotated[
        list[str],
        typer.Option(help='The options; --options "Positive" "Negative", or --options twice.'),
    ],
    more_options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION]...", help="Further options.")
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help='What is asked, "<extra_id_0> Title: <extra_id_1> Review:"; without it the '
            "instruction that each option suggests decides."
        ),
    ] = None,
    vocab: Annotated[
        str | None, typer.Option(help="Vocabulary folder of a fairseq checkpoint.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cpu.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of the generated instructions.")] = 64,
) -> None:
    """Show the instruction that each option suggests, and which option wins.

    The winner is the option under which the instruction is most likely: FLIPPED's inference.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from metro.models.source import model_source

    model_source(model)  # a wrong name is refused seconds before torch is imported
    print(f"loading {model}", file=sys.stderr, flush=True)
    from metro.evaluation.flip_demo import flip_options

    shown = flip_options(
        model,
        input,
        [*options, *(more_options or [])],
        instruction,
        vocab=vocab,
        dtype=dtype,
        device=device,
        max_new_tokens=max_new_tokens,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("option")
    table.add_column("log P(instruction)", justify="right")
    table.add_column("share", justify="right")
    table.add_column("instruction that the option suggests")
    for row in shown.rows:
        mark = "→" if row.option == shown.winner else ""
        style = "bold" if mark else None
        score, share = f"{row.score:.3f}", f"{100 * row.share:.1f} %"
        table.add_row(mark, Text(row.option), score, share, Text(row.generated), style=style)
    console = Console(soft_wrap=False)
    console.print(Text(f"instruction: {shown.instruction}"))
    console.print(table)
    console.print(Text(f"answer: {shown.winner}{tie([row.score for row in shown.rows])}"))


def tie(scores: list[float]) -> str:
    """What to add to the answer where the best options cannot be told apart."""
    best = max(scores)
    num_best = sum(best - score < TIE for score in scores)
    if num_best == 1:
        return ""
    return f" (a tie: {num_best} options differ by less than {TIE})"
