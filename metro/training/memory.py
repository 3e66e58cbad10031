"""The memory of a training on the CPU: kept from one update to the next, in huge pages.

An update takes and frees as much memory as the one before. By itself glibc has the system take and
give much of it each time, in pages of 4 kB filled with zeros: a sixth of an update of METRO-base.
"""

import ctypes
import functools
import mmap
import os
import sys
from pathlib import Path

HUGE = 2**21
"""Bytes of a huge page."""
LEFT_OVER = 1 / 8
"""The share beyond what an update needs that may lie between tensors."""
M_TRIM_THRESHOLD, M_MMAP_MAX, DEFAULT_MMAP_MAX = -1, -4, 65536
"""Names of settings in glibc's malloc.h, and the default of one."""


class Mallinfo(ctypes.Structure):
    """What glibc says of its memory: ``struct mallinfo2`` of its malloc.h."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


@functools.cache
def reserve_heap() -> bool:
    """Have glibc give memory from one heap, with room for all of the machine's, and keep it there.

    Addresses alone take no memory; a page does when something is first written to it. Other C
    libraries, limits on addresses and the user's own settings of malloc are left alone.

    Returns:
        whether it was done.
    """
    if not _may_reserve():
        return False
    library = _library()
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16 * 15
    library.mallopt(M_TRIM_THRESHOLD, -1)  # never
    library.mallopt(M_MMAP_MAX, 0)  # from the heap, however large
    succeeded = _advise(size, mmap.MADV_HUGEPAGE)
    library.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
    return succeeded


def _advise(size: int, advice: int) -> bool:
    """Take memory of this size, tell the system what of it, and free it."""
    library = _library()
    if (start := library.malloc(max(size, 0))) is None:
        return False
    first, end = -(-start // HUGE) * HUGE, (start + size) // HUGE * HUGE
    library.madvise(first, max(end - first, 0), advice)
    library.free(start)
    return True


def _may_reserve() -> bool:
    """Check for glibc 2.33 or later without the user's own settings, where addresses are free."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        return False
    chosen = ("MALLOC_MMAP_", "MALLOC_TRIM_", "MALLOC_TOP_", "GLIBC_TUNABLES")
    if any(name.startswith(chosen) for name in os.environ):
        return False
    import resource  # Windows has none

    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return False
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    return overcommit.exists() and overcommit.read_text().strip() != "2"


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.malloc_trim.argtypes, library.mallinfo2.restype = [ctypes.c_size_t], Mallinfo
    return library


class Heap:
    """Keeps memory, and gives it back after updates that left too much of it between tensors.

    Where batches differ in shape, an update finds other gaps in the heap than the one before, and
    writes to pages that were unused so far.
    """

    def __init__(self):
        self.is_kept = reserve_heap()
        self.needed, self.is_fresh = 0, True

    def tidy(self) -> None:
        """Compare the process's memory after an update with that after one that had no gaps."""
        if not self.is_kept:
            return
        resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        taken = (resident - of_files) * mmap.PAGESIZE
        if self.is_fresh:
            self.needed = max(self.needed, taken)
        self.is_fresh = taken > (1 + LEFT_OVER) * self.needed
        if self.is_fresh:
            self.give_back()

    def give_back(self) -> None:
        """Give the system what is free of the heap; the addresses stay."""
        if self.is_kept:
            library = _library()
            library.malloc_trim(ctypes.c_size_t(-1))  # between what is in use
            _advise(library.mallinfo2().keepcost - HUGE, mmap.MADV_DONTNEED)  # and behind it
