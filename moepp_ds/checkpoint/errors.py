"""What goes wrong with checkpoints, and how all ranks learn of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is missing or damaged, or is of another run."""


@contextmanager
def all_or_none() -> Iterator[None]:
    """Run a block on every rank; if it fails on one, raise CheckpointError with its message on all.

    So no rank waits for one that gave up, and the rank that prints knows what another one found. Collective.
    """
    problem = ""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        problem = str(error)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)  # pickles between the ranks of this job, never from a file
    if any(problems):
        raise CheckpointError("\n".join(dict.fromkeys(filter(None, problems))))
