"""Freed memory stays with the process.

A step on a CPU takes and frees the same tensors again and again. By default glibc asks the kernel for each large one,
which then hands out zeroed pages, one fault after the other: about a fifth of a step's time.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

KEPT = 2**31 - 1
"""Bytes: nothing smaller goes back to the kernel when it is freed."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_freed_memory() -> None:
    """For the rest of this process. Where the C library is not glibc nothing happens.

    For programs' entries: training, and measurements of it. MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the
    environment would do the same, for those alone who know of them.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, KEPT)
        mallopt(_M_MMAP_THRESHOLD, KEPT)
