"""Ordered, bounded map over worker processes; detects workers that died, and a killed parent."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from metro.utils.messages import UserError

_CHUNKS_PER_WORKER = 2

_function: Callable | None = None  # of this worker process


def available_cores() -> int:
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_order(
    factory: Callable, arguments: tuple, items: Iterable, num_workers: int
) -> Iterator[tuple]:
    """Yield ``(item, factory(*arguments)(item))`` for all items, in their order.

    The function is built once per worker. At most a few items per worker are read ahead, so memory
    does not grow with their number. One worker means this process itself.

    Raises:
        UserError: a worker died, for instance because memory ran out.
    """
    if num_workers == 1:
        function = factory(*arguments)
        yield from ((item, function(item)) for item in items)
        return
    # fork starts in no time; it is safe because no thread exists yet when the pool starts.
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    pool = ProcessPoolExecutor(
        num_workers, context, initializer=_start_worker, initargs=(factory, arguments, os.getpid())
    )
    pending: deque = deque()
    try:
        pool.submit(int).result()  # start the workers before `items` opens files or starts threads
        for item in items:
            pending.append((item, pool.submit(_call, item)))
            if len(pending) >= num_workers * _CHUNKS_PER_WORKER + 1:
                item, future = pending.popleft()
                yield item, future.result()
        while pending:
            item, future = pending.popleft()
            yield item, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps out of memory; run the same command again with fewer "
            "--workers to resume"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(factory: Callable, arguments: tuple, parent: int) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    _function = factory(*arguments)
    gc.freeze()  # modules are no garbage: searching them took most of the time of reading files


def _exit_with(parent: int) -> None:
    """End this worker when its parent has been killed and cannot do it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
