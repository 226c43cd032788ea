"""Freed memory stays with the process, in one piece.

A step on a CPU takes and frees the same tensors again and again. By default glibc asks the kernel for each large one,
which then hands out zeroed pages, one fault after the other: from a fifth to more than half of a step's time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>
_TUNABLES, _NO_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"


def keep_freed_memory() -> None:
    """For the rest of this process. Where the C library is not glibc nothing happens.

    For programs' entries: training, and measurements of it. Not by M_MMAP_THRESHOLD, which glibc before 2.35 refuses
    to raise beyond 32 MiB: with no threshold of its own but with trimming set, it would map and unmap every tensor.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_M_MMAP_MAX, 0):  # nothing is mapped for itself
            mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def unsplit_memory(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable by which processes yet to be started join again all that they free; what it holds already stays.

    A tensor is an aligned block, and glibc cuts off what lies before it: a few bytes, which it caches for the thread
    instead of joining them with the freed tensor, so that a tensor of the same size does not fit there again (glibc
    bug 14581, seen with 2.36). Without these caches a run took a third less memory, and no more time.
    """
    given = environment.get(_TUNABLES, "")
    if _NO_CACHE in given:
        return {}
    return {_TUNABLES: ":".join(filter(None, [given, f"{_NO_CACHE}=0"]))}
