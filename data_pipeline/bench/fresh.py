"""A function in a process of its own, so that no measurement finds memory or caches that another one left; and what
it took.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

Result = TypeVar("Result")
CLOCKS = ("wall", "cpu")
"""The fields of `Seconds`."""


@dataclass
class Seconds:
    """Time taken, summed over all that was timed."""

    wall: float = 0.0
    cpu: float = 0.0
    """Of this process and of its children that have ended: tells more where others use the machine too."""

    @contextmanager
    def add(self) -> Iterator[None]:
        """Time a block."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += _cpu_seconds() - cpu


def median_of(taken: Sequence[Seconds], by: str) -> float:
    """The median by one of `CLOCKS`."""
    return median(getattr(each, by) for each in taken)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """What `function(*args)` returns in a new interpreter; all of it must be picklable."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_megabytes() -> float:
    """The most memory this process has had resident so far, in million bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def peak_megabytes_of_children() -> float:
    """The most that any one ended child of this process had, in million bytes; 0.0 without children."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
