"""Errors that the ranks agree on: what stops one rank is raised, in the same words, by all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class AgreedError(RuntimeError):
    """An error that every rank raises, with the same words."""


class FinalError(AgreedError):
    """One after which nothing starts the run again by itself: it would fail alike, or go on from what is wrong."""


@contextmanager
def all_or_none(kind: type[Exception] = AgreedError) -> Iterator[None]:
    """Run a block on every rank; if it fails on one, raise `kind` with its words on all. Collective.

    So no rank waits for one that gave up, and the rank that prints knows what another one found. The block must not
    itself wait for other ranks: one that failed would not come. KeyboardInterrupt and SystemExit are not held up.
    An AgreedError is a FinalError where nothing but faults of the input was found.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    problems = gather(None if own is None else (_words(own, kind), is_of_input(own)))
    message = agreed_message([None if problem is None else problem[0] for problem in problems])
    if message is not None:
        of_input = all(problem[1] for problem in problems if problem is not None)
        raise (FinalError if of_input and issubclass(FinalError, kind) else kind)(message) from own


def is_of_input(error: Exception) -> bool:
    """Whether an error is a fault of what was given, which another try would find again: a ValueError.

    Not one that a reader made of the file system's error, which may be gone soon; but a missing file will be missing.
    """
    behind = error.__cause__ or error.__context__
    return isinstance(error, ValueError) and (not isinstance(behind, OSError) or isinstance(behind, FileNotFoundError))


def gather(value: T) -> list[T]:
    """The value of every rank, by rank. Collective; a process that is alone needs no process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)  # pickles between the ranks of this job, never from a file
    return values


def agreed_message(problems: Sequence[str | None]) -> str | None:
    """One text for the problems of the ranks, by rank; None if no rank has one.

    The bare words if every rank has the same; else each different problem once, after the ranks that have it.
    """
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(rank)
    if len(ranks) == 1 and None not in problems:
        return next(iter(ranks))
    return "\n".join(f"{name_ranks(found)}: {problem}" for problem, found in ranks.items()) or None


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _words(error: Exception, kind: type[Exception]) -> str:
    """What an error says; also what it is, where its words were not made to be read without that (a KeyError's)."""
    words = str(error)
    if words and isinstance(error, (kind, ValueError, OSError, RuntimeError)):
        return words
    return f"{type(error).__name__}: {words}".removesuffix(": ")
