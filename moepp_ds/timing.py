"""Times of actions that take turns, so that whatever slows the machine down for a while slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

WARM_UP = 2
"""Rounds that do not count: memory is taken and kernels are chosen in them."""


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
    """Seconds of each action in `repeats` rounds, in each of which every action has its turn, another one the first."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for number in range(WARM_UP + repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = clock(actions[name])
            if number >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: Mapping[str, list[float]], rival: str, own: str) -> float:
    """How many times as fast `own` is as `rival`: the median over rounds, so that what slows a round cancels out."""
    return median(theirs / ours for theirs, ours in zip(seconds[rival], seconds[own], strict=True))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
