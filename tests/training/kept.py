"""How much of a process's memory is new to it."""

import platform

import pytest

from tests.processes import run_python

of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")

NEW_PAGES = """
import resource, torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def make_tensors():
    for _ in range(10):
        torch.ones(2**24)

make_tensors()  # malloc's caches of what lies between them fill
before = faults()
make_tensors()
print(faults() - before)
"""
"""Prints how many pages the system gave for ten tensors of 64 MiB, one after the other."""

COUNTED = """
from metro.training.memory import Heap

times_tidied, tidy = [], Heap.tidy
Heap.tidy = lambda heap: times_tidied.append(tidy(heap))
"""
"""Counts how often the heap is tidied."""

ONCE = "\nassert len(times_tidied) == 1"
"""After a training of one update."""

FEW, MANY = 50, 300
"""Of these, where memory is kept and where it is not, in huge pages at that."""


def new_pages(*arguments, **options) -> int:
    """Of a process that does something else first."""
    return int(run_python("-c", *arguments, **options).stdout.split()[-1])
