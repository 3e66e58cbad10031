"""`metro rank`: a label for each of one's own texts."""

import json

import click

from metro.cli.generate import open_texts
from metro.cli.options import settings_command
from metro.ranking.settings import RankSettings
from metro.utils.progress import Progress


def rank(settings: RankSettings, texts: tuple[str, ...], as_json: bool) -> None:
    """Choose a label for each text: of the command line, of stdin, of a file or a dataset.

    Prints label, probability and text; --out writes a file, and resumes an interrupted one. Texts
    come before --options.
    """
    from metro.ranking.run import RankRun
    from metro.ranking.run import rank as rank_texts

    given = None if settings.input and not texts else open_texts(texts, None)
    with Progress() as progress:
        if settings.out is not None:
            done = rank_texts(settings, given, progress=progress)
            progress.say(f"{done.out}: {done.num_rows:,} rows")
            return
        run = RankRun(settings, given, progress)
        for each in run:
            if as_json:
                click.echo(json.dumps(each._asdict(), ensure_ascii=False))
            else:
                share = "" if each.probability is None else f"{each.probability:.4f}"
                text = " ".join((each.text or "").split())
                problem = [] if each.problem is None else [each.problem]
                click.echo("\t".join([each.label or "", share, text, *problem]))
        run.say_left_out()


command = settings_command(
    rank,
    RankSettings,
    example="metro rank metro_t0_base --input mails.csv --text body --options good bad",
    resumes=True,
    extra=[
        click.Argument(["texts"], nargs=-1, metavar="[TEXT]...", help="Texts; - reads stdin."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print a JSON object per text."),
    ],
)
