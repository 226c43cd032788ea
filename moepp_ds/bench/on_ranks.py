"""Measurements that need several ranks: how they start, and whose time counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist

from moepp_ds.agreement import AgreedError, gather
from moepp_ds.config import RecipeError
from moepp_ds.engine import Ranks, join_ranks
from moepp_ds.freed_memory import keep_freed_memory, unsplit_memory
from moepp_ds.supervisor.hosts import free_port
from moepp_ds.timing import seconds_of, take_turns


@contextmanager
def on_ranks(count: int) -> Iterator[Ranks]:
    """Run the block, and the whole command around it, on every rank.

    A process that no launcher has started becomes the `deepspeed` launcher of its own command line on `count` ranks of
    this machine; one that is a rank joins the others. What all ranks agree cannot be is a RecipeError.
    """
    if "RANK" not in os.environ and count > 1:
        _start_ranks(count)
    keep_freed_memory()
    ranks = join_ranks()
    try:
        yield ranks
    except AgreedError as error:
        raise RecipeError(str(error)) from None
    dist.destroy_process_group()


def _start_ranks(count: int) -> None:
    # With more threads than cores ranks wait for one another inside every product.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ.update(unsplit_memory(os.environ))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(count)]
    options = ["--master_port", str(free_port()), "--no_local_rank", "--module", "moepp_ds"]
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, *options, *sys.argv[1:]])


def slowest(action: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until the last is done. Collective."""
    dist.barrier()
    return max(gather(seconds_of(action)))


def take_turns_on_ranks(actions: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """As `timing.take_turns`, of the slowest rank each time. Collective."""
    return take_turns(actions, repeats=repeats, clock=slowest)
