"""Shared by the benchmarks: isolated runs, peak memory, tables, and results as JSON.

A benchmark is a module `benchmarks/<subject>.py`, run from the root of the project as
`python -m benchmarks.<subject>`. It prints a table and calls `write_results`; what
it is compared with runs in the same call, on the same cores.
"""

import functools
import inspect
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """Published vocabularies, templates and rows, which are not part of the project.

    METRO_TESTDATA, or the folder `shared` beside the project or in it.
    """
    folders = [ROOT.parent / "shared", ROOT / "shared"]
    if given := os.environ.get("METRO_TESTDATA"):
        folders = [Path(given)]
    return next((folder for folder in folders if (folder / "data").is_dir()), folders[0])


class Measured(NamedTuple):
    """What a function that runs in a process of its own has returned or yielded."""

    value: Any
    seconds: float
    """Wall time since it was called, start of the process not included."""
    peak_bytes: int
    """Peak resident memory of the process, imports included."""


def peak_memory_bytes() -> int:
    """Peak resident memory of this process.

    Not `getrusage`: its maximum survives `exec`, so a child reports its parent's peak.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: peak memory can be read on Linux only")


def measure_isolated(function: Callable, *args: Any) -> Measured:
    """Call a module-level function in a process of its own, so that peaks do not mix.

    Raises:
        RuntimeError: it did not return; its own message has been printed.
    """
    (measured,) = measure_each(function, *args)
    return measured


def measure_each(function: Callable, *args: Any) -> Iterator[Measured]:
    """Run a module-level generator in a process of its own; yield each value as soon as it does.

    Raises:
        RuntimeError: it did not end; what it had yielded is known by then.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        while (measured := receiver.recv()) is not None:
            yield measured
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{function.__name__}{args} died with code {process.exitcode}; its message is above"
        ) from None
    except GeneratorExit:  # the caller wants no more
        process.kill()
        process.join()
        raise
    process.join()


def _call(sender, function: Callable, args: tuple) -> None:
    start = time.perf_counter()
    found = function(*args)
    for value in found if inspect.isgenerator(found) else [found]:
        seconds = time.perf_counter() - start
        sender.send(Measured(value, seconds, peak_memory_bytes()))
    sender.send(None)


def results_folder() -> Path:
    """The environment's OUT, or `benchmarks/results`."""
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(subject: str, rows: Sequence[dict[str, Any]], **facts: Any) -> Path:
    """Store the rows with the machine they were measured on in `<results>/<subject>.json`."""
    path = results_folder() / f"{subject}.json"
    result = {"subject": subject, "date": time.strftime("%Y-%m-%d"), **facts, "rows": list(rows)}
    result["environment"] = environment()
    text = json.dumps(result, indent=2).replace(str(ROOT), ".")
    unfinished = path.with_suffix(".tmp")  # a run that is killed leaves what it wrote before
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
    print(f"written: {path}", flush=True)
    return path


@functools.cache
def environment() -> dict[str, Any]:
    """What `metro doctor` shows; looked at once, as it imports much."""
    from metro.environment import inspect_environment

    return inspect_environment().as_dict()


def print_table(rows: Sequence[dict[str, Any]], title: str | None = None) -> None:
    """Print rows that share their keys, numbers to three significant places."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(_as_text(value) for value in row.values()))
    Console(width=None if os.isatty(1) else 140).print(table)


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
