"""`metro.rank`: the labels of a file, a dataset or a list of texts."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metro.data.jsonl_rows import UnusableRow
from metro.data.own_rows import all_rows
from metro.data.prompts.examples import VALUE_CUT, LeftOut, count_row
from metro.models.source import model_source
from metro.ranking.inputs import open_input
from metro.ranking.questions import DEFAULT_TEMPLATE, Questions
from metro.ranking.settings import RankSettings
from metro.utils.files import check_output
from metro.utils.messages import UserError, counted
from metro.utils.progress import Progress

if TYPE_CHECKING:
    from metro.ranking.ranker import Ranked


class RankResult(NamedTuple):
    """Result of `rank`."""

    ranked: "list[Ranked]"
    """One for each row, in their order; empty where ``out`` has them."""
    out: Path | None
    """The file written."""
    num_rows: int
    num_left_out: int
    """Rows of this call that cannot be ranked: they have a problem and no label."""


def rank(
    settings: RankSettings | None = None,
    texts: Iterable[Any] | None = None,
    *,
    progress: bool | Progress = True,
    **options: Any,
) -> RankResult:
    """Choose a label for each text; with ``out`` into a file, resuming an interrupted call.

    Args:
        settings: all options, or give them one by one.
        texts: texts or rows of fields, instead of ``input``.
        progress: show progress on stderr.
        options: fields of `RankSettings`, such as ``model``, ``input``, ``options`` and ``out``.

    Raises:
        UserError: a setting is wrong, or none of the first rows can be ranked.
    """
    settings = RankSettings.of(settings, **options)
    with Progress.of(progress) as shown:
        run = RankRun(settings, texts, shown)
        ranked = list(run) if settings.out is None else []
        if settings.out is not None:
            run.write(settings.out)
        run.say_left_out()
    return RankResult(ranked, settings.out, run.num_rows, run.num_left_out)


class RankRun:
    """One pass over the rows; iterating it ranks them.

    Args:
        settings: see `RankSettings`.
        texts: instead of the settings' input.
        progress: shows the model, the question, and how far it is.
    """

    def __init__(self, settings: RankSettings, texts: Iterable[Any] | None, progress: Progress):
        if settings.out is not None:  # before seconds of imports, as what follows
            check_output(settings.out, settings.overwrite, _inputs(settings))
        model_source(settings.model)
        if texts is not None and settings.input is not None:
            raise UserError("give texts or --input, not both")
        questions = Questions(settings, flipped=settings.method_of(settings.model) == "flipped")
        rows = open_input(settings, questions) if texts is None else texts
        self.total = len(rows) if isinstance(rows, Sequence) else None
        self.settings, self.progress = settings, progress
        progress.say(f"loading {settings.model}")
        from metro.ranking.ranker import Ranker

        self.ranker: Ranker = Ranker(settings.model, settings=settings)
        if self.ranker.processes.count > 1 and self.total is None:
            raise UserError("several processes cannot share these texts: give them as --input FILE")
        self.rows = all_rows(rows) if isinstance(rows, Sequence) else iter(rows)
        self.num_rows = 0
        self.left_out: dict[str, LeftOut] = {}
        progress.say(self.ranker.scored.describe())
        if questions.is_default:
            progress.say(f"asked with (--template changes it): {DEFAULT_TEMPLATE!r}")

    def __iter__(self) -> "Iterator[Ranked]":
        first, show = self.num_rows, self._show
        held: list[Ranked] = []  # while none can be ranked
        show(first)
        for each in self.ranker.rank(self.rows, first=first, progress=show):
            if each.problem is not None:
                reason, _, detail = each.problem.partition(": ")
                count_row(self.left_out, UnusableRow(reason, detail), f"row {self.num_rows}")
            self.num_rows += 1
            if self.num_rows == self.ranker.window:
                self.refuse_useless()
            held.append(each)
            if self.num_left_out < self.num_rows:
                yield from held
                held.clear()
        self.refuse_useless()

    def refuse_useless(self) -> None:
        """Stop where none of the first rows can be ranked: the template or a field is wrong.

        Raises:
            UserError: the problem of the first row.
        """
        if self.left_out and self.num_left_out == self.num_rows:
            reason, left_out = next(iter(self.left_out.items()))
            raise UserError(
                f"none of the first {self.num_rows} rows can be ranked: {reason} ({left_out.first})"
            )

    @property
    def num_left_out(self) -> int:
        """Rows without a label so far."""
        return sum(left_out.num_rows for left_out in self.left_out.values())

    def _show(self, done: float) -> None:
        self.progress.show("ranking", done, self.total, f"{int(done):,} rows")

    def write(self, out: Path) -> None:
        """Rank the rows into a file, beginning behind those that an earlier run has done."""
        from metro.ranking.output import RankedFile, row_digest

        processes = self.ranker.processes
        with ExitStack() as stack:

            def open_file() -> RankedFile:
                made = RankedFile(out, self.settings.overwrite, _inputs(self.settings))
                stack.enter_context(made).open(self.identity())
                return made

            file = processes.on_first(open_file)
            self.num_rows = processes.from_first(lambda: file.num_done if file else 0)
            if self.num_rows:
                self.progress.say(f"resuming behind {counted(self.num_rows, 'row')}")
            done = itertools.islice(self.rows, self.num_rows)
            processes.on_first(lambda: file.check_rows(done) if file else None)
            for _ in done:  # of the other processes
                pass
            digests: list[str] = []
            self.rows = _noted(self.rows, lambda row: digests.append(row_digest(row)))
            ranked = iter(self)
            while window := list(itertools.islice(ranked, self.ranker.window)):
                if file is not None:
                    file.write(zip(digests, window, strict=False))
                del digests[: len(window)]
            options = self.ranker.questions.options
            processes.on_first(lambda: file.finish(options) if file else None)

    def identity(self) -> dict[str, Any]:
        """All that decides the numbers, but for the rows."""
        scored, settings = self.ranker.scored, self.settings
        return {
            "model": scored.identity,
            "dtype": scored.dtype,
            "method": scored.method,
            "protocol": scored.protocol.as_dict(),
            "normalization": settings.normalization,
            "templates": [[t.jinja, t.answer_choices] for t in self.ranker.questions.templates],
            "options": self.ranker.questions.options,
            "options_field": settings.options_field,
            "text": settings.text,
            "instruction_text": settings.instruction_text,
            "seed": settings.seed,
        }

    def say_left_out(self) -> None:
        """Name the rows without a label, and say what was cut."""
        encoder, cut = self.ranker.classifier.encoder, self.ranker.num_cut_values
        remarks = [f"{counted(cut, 'row')} with a {VALUE_CUT}"] if cut else []
        target = "option" if self.ranker.scored.method == "direct" else "target"
        for remark in remarks + encoder.describe_cuts(target):
            self.progress.say(remark)
        for reason, left_out in self.left_out.items():
            rows = counted(left_out.num_rows, "row")
            self.progress.say(f"{rows} without a label: {reason} (first: {left_out.first})")


def _inputs(settings: RankSettings) -> tuple[Path, ...]:
    return (Path(settings.input),) if settings.input else ()


def _noted(rows: Iterator[Any], note: Callable[[Any], None]) -> Iterator[Any]:
    for row in rows:
        note(row)
        yield row
