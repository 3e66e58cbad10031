"""What the commands that prepare data share: their bars, and how an interruption ends."""

import time

import typer

_SECONDS_BETWEEN_LOOKS = 0.1


class Work:
    """A context in which a command that can be continued does its work.

    Args:
        columns: of the bars, as rich has them.
    """

    def __init__(self, *columns):
        from rich.console import Console
        from rich.progress import Progress

        self.console = Console(stderr=True, highlight=False)
        # No thread refreshes it: worker processes are forked while the bar stands.
        self.bar = Progress(*columns, console=self.console, auto_refresh=False)
        self._tasks: dict[str, int] = {}
        self._last_shown = 0.0

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def show(self, name: str, **state) -> None:
        """Move the bar of that name; `state` is what rich's `Progress.update` takes."""
        if name not in self._tasks:
            self.bar.start()  # not before: a refused option would leave an empty bar behind
            self._tasks[name] = self.bar.add_task(**{"description": name, **state})
        is_due = time.monotonic() - self._last_shown > _SECONDS_BETWEEN_LOOKS
        self._last_shown = time.monotonic() if is_due else self._last_shown
        self.bar.update(self._tasks[name], **state, refresh=is_due)

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.bar.live.is_started:
            self.bar.stop()
        if isinstance(error, KeyboardInterrupt):
            self.say("interrupted: run the same command again to continue")
            raise typer.Exit(130) from None
        if isinstance(error, RuntimeError):
            self.say(f"error: {error}")
            raise typer.Exit(1) from None
