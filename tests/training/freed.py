"""How much memory a process gives back of what it has freed."""

import platform

import pytest

from tests.processes import run_python

of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")

GIVEN_BACK = """
import torch

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

torch.ones(2**22)  # from here on glibc by itself keeps what is smaller
tensors = [torch.ones(2**21) for _ in range(20)]
above = torch.ones(2**21)
before = resident()
del tensors
print(round(before - resident()))
"""
"""Prints MiB that the system gets back of 20 freed tensors of 8 MiB each, below one that stays."""


def given_back(*arguments, **options) -> int:
    """Of a process that does something else first."""
    return int(run_python("-c", *arguments, **options).stdout.split()[-1])
