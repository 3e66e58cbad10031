"""Work split by hand over the CPU's cores, for operations whose parts fit in a core's cache.

PyTorch splits each operation over all cores, so that one reads what another has written, and all
wait for each other hundreds of times in one attention. Here every core does a part from its first
operation to its last; PyTorch releases the interpreter's lock while it computes.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def for_each(function: Callable, parts: Iterable) -> None:
    """Call ``function`` of each part, without gradients, on as many cores as PyTorch uses.

    The parts must not write to the same memory. Which thread computes a part changes nothing.
    """
    parts, num_threads = list(parts), torch.get_num_threads()
    num_workers = min(len(parts), num_threads)
    if num_workers < 2:
        with torch.no_grad():
            for part in parts:
                function(part)
        return
    pool = worker_pool(os.getpid(), num_workers, num_threads // num_workers)
    for done in [pool.submit(torch.no_grad()(function), part) for part in parts]:
        done.result()


@functools.lru_cache(maxsize=8)
def worker_pool(process_id: int, num_workers: int, threads_each: int) -> ThreadPoolExecutor:
    """Workers that stay; PyTorch's number of threads is one of each thread's settings.

    A forked process has none of its parent's threads, hence ``process_id``.
    """
    return ThreadPoolExecutor(num_workers, "metro-ops", torch.set_num_threads, (threads_each,))
