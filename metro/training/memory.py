"""What a training on the CPU keeps of the memory that it has freed."""

import ctypes
import os
import sys

LARGE = 2**22
"""Bytes from which a tensor's memory goes back to the system when it is freed."""
M_MMAP_THRESHOLD = -3
"""The name of that setting in glibc's malloc.h."""


def return_large_tensors() -> None:
    """Have glibc give the memory of large tensors back as soon as they are freed.

    By itself glibc does so from the largest size on that it has freed before, up to 32 MiB, and
    keeps the rest. What an update frees lies between tensors that stay, and most of it is too short
    for what the next one needs: METRO-base in bf16 took a quarter more memory. Other C libraries
    are left alone, and so is glibc where the environment has ``MALLOC_MMAP_THRESHOLD_``.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
