"""`metro flip`: ask a model which answer choice makes an instruction most probable."""

from metro.cli.options import settings_command
from metro.evaluation.settings import FlipSettings
from metro.utils.progress import Progress

TIE = 0.001
"""Scores that the table shows as equal; an answer by less than that means nothing."""


def flip(settings: FlipSettings) -> None:
    """Show the instruction that each answer choice suggests, and which choice wins.

    The winner is the choice under which the instruction is most probable: FLIPPED's inference.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from metro.models.source import model_source

    model_source(settings.model)  # a wrong name is refused seconds before torch is imported
    Progress().say(f"loading {settings.model}")
    from metro.evaluation.flip_demo import flip_choices

    shown = flip_choices(settings)
    for note in shown.notes:
        Progress().say(f"warning: {note}")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("answer choice")
    table.add_column("log P(instruction)", justify="right")
    table.add_column("share", justify="right")
    table.add_column("instruction that the choice suggests")
    for row in shown.rows:
        mark = "→" if row.choice == shown.winner else ""
        style = "bold" if mark else None
        score, share = f"{row.score:.3f}", f"{100 * row.share:.1f} %"
        table.add_row(mark, Text(row.choice), score, share, Text(row.generated), style=style)
    console = Console(soft_wrap=False)
    console.print(Text(f"instruction: {shown.instruction}"))
    console.print(table)
    console.print(Text(f"answer: {shown.winner}{tie([row.score for row in shown.rows])}"))


def tie(scores: list[float]) -> str:
    """A remark on the answer if the best answer choices cannot be told apart."""
    best = max(scores)
    num_best = sum(best - score < TIE for score in scores)
    if num_best == 1:
        return ""
    return f" (a tie: {num_best} answer choices differ by less than {TIE})"


command = settings_command(
    flip,
    FlipSettings,
    example='metro flip flipped_3b --input "A lovely film." --options Positive Negative',
)
