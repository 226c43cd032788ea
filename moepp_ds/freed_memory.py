"""Freed memory stays with the process.

A step on a CPU takes and frees the same tensors again and again. By default glibc asks the kernel for each large one,
which then hands out zeroed pages, one fault after the other: about a fifth of a step's time.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """For the rest of this process. Where the C library is not glibc nothing happens.

    For programs' entries: training, and measurements of it. Not by M_MMAP_THRESHOLD, which glibc before 2.35 refuses
    to raise beyond 32 MiB: with no threshold of its own but with trimming set, it would map and unmap every tensor.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_M_MMAP_MAX, 0):  # nothing is mapped for itself
            mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap never shrinks
