"""Progress of a long command, on stderr: bars on a terminal, a line now and then elsewhere.

Whatever takes long without a word (imports, loading, one large batch) is named while it lasts.
"""

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

SECONDS_OF_SILENCE = 20.0
"""Elsewhere than on a terminal a line follows the last one after this time."""
SECONDS_TO_FIRST_SIGN = 5.0
SECONDS_BETWEEN_REFRESHES = 0.1


def is_first_process() -> bool:
    """True in the first of the processes that ``torchrun`` started, and without it."""
    return os.environ.get("RANK", "0") == "0"


class SignsOfLife:
    """Says what is being done whenever nothing has been shown for a while; one for the process.

    A context, which may be entered again within itself. It writes from a thread, past Python's
    files and their locks, so that processes may be forked meanwhile.
    """

    def __init__(self) -> None:
        self.silence = SECONDS_OF_SILENCE
        self.refresh: Callable[[], None] | None = None
        """Draws the bars of a terminal again, if there are any."""
        self._depth = 0
        self._ended = threading.Event()
        self.do("starting")

    def do(self, what: str) -> None:
        """Note what is being done from now on."""
        self._doing, self._since = what, time.monotonic()

    def heard(self) -> None:
        """Note that something has been shown just now."""
        self._last_shown = time.monotonic()

    def is_due(self, seconds: float | None = None) -> bool:
        """Tell whether nothing has been shown for so long, by default ``silence``."""
        return time.monotonic() - self._last_shown >= (seconds or self.silence)

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and is_first_process():
            self._ended = threading.Event()
            self.do("starting")
            self.heard()
            threading.Thread(target=self._watch, args=(self._ended,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._ended.set()

    def _watch(self, ended: threading.Event) -> None:
        due = min(SECONDS_TO_FIRST_SIGN, self.silence)
        while not ended.wait(min(1.0, due)):
            if self.is_due(due):
                due = self.silence
                self.heard()
                if self.refresh is not None:
                    self.refresh()
                else:
                    seconds = time.monotonic() - self._since
                    os.write(2, f"{self._doing} ({seconds:.0f} s so far)\n".encode())


LIFE = SignsOfLife()


@dataclass
class _Step:
    """Step that has begun."""

    began: float
    first: float
    """Work done when it began."""
    done: float
    bar: int | None


class Progress:
    """Display of messages and of the progress of steps; a context, at whose end the bars stop.

    Args:
        enabled: False shows nothing, nor do processes of ``torchrun`` other than the first.
        bars: show them on a terminal.
    """

    def __init__(self, enabled: bool = True, bars: bool = True):
        self.enabled = enabled and is_first_process()
        self._may_have_bars = bars
        self._bars: Any = None
        self._steps: dict[str, _Step] = {}
        if self.enabled:
            from rich.console import Console

            is_notebook = "ipykernel" in sys.modules  # whose stderr says that it is a terminal
            self._console = Console(
                stderr=True,
                highlight=False,
                soft_wrap=True,
                force_jupyter=False,
                force_terminal=False if is_notebook else None,
            )

    @classmethod
    def of(cls, progress: "bool | Progress") -> "Progress":
        """The argument ``progress`` of a public function: shown or not, or one that exists."""
        return progress if isinstance(progress, Progress) else cls(progress)

    def say(self, line: str) -> None:
        """Print a line that a user should read."""
        if self.enabled:
            self._console.print(line, markup=False)
            LIFE.do(line)
            LIFE.heard()

    def show(self, step: str, done: float, total: float | None = None, note: str = "") -> None:
        """Show how far a step is.

        Args:
            step: name of its bar. The first call begins the step; ``done`` may be more than 0.
                A smaller ``done`` than before begins it again.
            done: work done, in any unit.
            total: all of it, where it is known.
            note: what is being done right now.
        """
        if not self.enabled:
            return
        now = time.monotonic()
        known = self._steps.get(step)
        if known is None or done < known.done:
            bar = known.bar if known else self._new_bar(step)
            known = self._steps[step] = _Step(now, done, done, bar)
            if bar is not None:
                self._bars.reset(bar)
        known.done = done
        bar = known.bar
        if left := self.time_left(step, done, total):
            note = f"{left} left  {note}".rstrip()
        share = f" {done / total:.0%}" if total else ""
        line = f"{step}{share}  {note}".rstrip()
        LIFE.do(line)
        if bar is not None:
            is_due = LIFE.is_due(SECONDS_BETWEEN_REFRESHES)
            self._bars.update(bar, completed=done, total=total, note=note, refresh=is_due)
            if is_due:
                LIFE.heard()
        elif LIFE.is_due():
            self.say(line)

    def time_left(self, step: str, done: float, total: float | None) -> str:
        """Time that the rest of a step takes at its speed so far, empty where it is unknown."""
        known = self._steps.get(step)
        if known is None or not total or done <= known.first:
            return ""
        seconds = (time.monotonic() - known.began) / (done - known.first) * max(total - done, 0)
        return str(datetime.timedelta(seconds=round(seconds)))

    def _new_bar(self, step: str) -> int | None:
        if not self._may_have_bars or not self._console.is_terminal:
            return None
        if self._bars is None:
            from rich import progress

            # Without a thread that refreshes it: worker processes are forked while it is shown.
            self._bars = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
                auto_refresh=False,
            )
            self._bars.start()
            LIFE.refresh = self._bars.refresh
        return self._bars.add_task(step, total=None, note="")

    def __enter__(self) -> Self:
        if self.enabled:
            LIFE.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            LIFE.refresh = None
            self._bars.stop()
            self._bars = None
        if self.enabled:
            LIFE.__exit__()
        self._steps.clear()


SILENT = Progress(enabled=False)
"""Shows nothing."""
