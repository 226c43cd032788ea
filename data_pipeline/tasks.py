"""Sharing a build out among independent tasks, each on a machine of its own.

Task i of n (counted from 1) builds a share of the raw files. The shares are a pure function of the list of
files and n: the largest file first, each goes to the task that has the fewest bytes so far. So tasks need not
talk to one another, and a task that was killed and is started again takes up the same share.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from data_pipeline.document import DataError


@dataclass(frozen=True, slots=True)
class Task:
    """One task of several."""

    number: int
    """1 to `of`."""
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise DataError(f"there is no task {self}: tasks are counted from 1 to their number, as in 1/8 to 8/8")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parse_task(text: str, environment: Mapping[str, str] = os.environ) -> Task:
    """`i/n`, or `slurm`: the place of this task in its SLURM job array, by the variables that SLURM sets.

    The array must be regular (`--array=0-15`, `1-8`, `0-30:2`) and whole; to run some of its tasks again, name
    them as i/n.
    """
    if text == "slurm":
        return _slurm_task(environment)
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found:
        raise DataError(f"--task {text!r} is neither i/n, such as 1/8 (counted from 1), nor slurm")
    return Task(int(found[1]), int(found[2]))


def _slurm_task(environment: Mapping[str, str]) -> Task:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    values = [environment.get(name, "") for name in names]
    if not all(value.isdecimal() for value in values):
        wrong = ", ".join(f"{name}={value!r}" for name, value in zip(names, values) if not value.isdecimal())
        raise DataError(f"--task slurm outside a SLURM job array ({wrong}); submit with --array, or give --task i/n")
    place, first, last, count = map(int, values)
    step, rest = divmod(last - first, count - 1) if count > 1 else (1, last - first)
    if rest or step < 1 or (place - first) % step or not first <= place <= last:
        raise DataError(
            f"--task slurm in a job array that is not regular ({', '.join(map('='.join, zip(names, values)))}), where"
            f" the task has no place; submit with --array=1-{count}, or give --task i/n"
        )
    return Task((place - first) // step + 1, count)


class Sized(Protocol):
    """Something to be shared out."""

    @property
    def key(self) -> str:
        """Names it."""

    @property
    def size(self) -> int:
        """Its weight: bytes."""


Job = TypeVar("Job", bound=Sized)


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """The order to work in: the last jobs to end are short ones, so that workers end together."""
    return sorted(jobs, key=lambda job: (-job.size, job.key))


def shares(jobs: Sequence[Job], tasks: int) -> list[list[Job]]:
    """The jobs of each of `tasks` tasks, the longest first; every job is in exactly one share."""
    dealt: list[list[Job]] = [[] for _ in range(tasks)]
    loads = [(0, task) for task in range(tasks)]
    for job in longest_first(jobs):
        load, task = loads[0]
        dealt[task].append(job)
        heapq.heapreplace(loads, (load + job.size, task))
    return dealt


def fingerprint(files: Iterable[tuple[str, int]]) -> str:
    """Names a list of (name, bytes), as far as shares of it depend on it: equal lists in any order, equal names."""
    lines = sorted(f"{size} {name}\n" for name, size in files)
    return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()
