"""Times of actions that take turns, so that whatever slows the machine down for a while slows all of them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from statistics import median

import torch

WARM_UP = 2
"""Rounds that do not count: memory is taken and kernels are chosen in them."""


KEPT = 2**31 - 1
"""Bytes: glibc gives back nothing that is smaller."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_memory() -> None:
    """Have this process keep freed memory for the next tensor, as `launch/setup_env.sh` has it for training.

    Giving it back and taking it again is page faults. Where the C library is not glibc nothing happens.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, KEPT)
        mallopt(_M_MMAP_THRESHOLD, KEPT)


def seconds_of(action: Callable[[], object]) -> float:
    """How long it takes, on a GPU until it is idle again."""
    _wait()
    started = time.perf_counter()
    action()
    _wait()
    return time.perf_counter() - started


def take_turns(
    actions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = seconds_of,
) -> dict[str, list[float]]:
    """Seconds of each action in `repeats` rounds, in each of which every action has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(WARM_UP + repeats):
        for name, action in actions.items():
            taken = clock(action)
            if number >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: Mapping[str, list[float]], rival: str, own: str) -> float:
    """How many times as fast `own` is as `rival`, in the medians."""
    return median(seconds[rival]) / median(seconds[own])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
