"""Checks of when a run is saved, in real ranks; tests/test_saves.py starts them.

    ... --module tests.programs.saves_checks FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch.distributed as dist

from moepp_ds.checkpoint.files import candidates, step_of
from moepp_ds.controller import RoutingState
from moepp_ds.run import Progress, Run
from moepp_ds.saves import Saves
from tests.programs import checks, tiny
from tests.programs.checkpoint_checks import FOLDER, RANKS, files_of_at_most, wait_until


@contextmanager
def saves_of(name: str, *overrides: str, resumed: Path | None = None) -> Iterator[Saves]:
    """The saves of a run of the tiny recipe that has no data and no record; its folder has that name."""
    asked = tiny.recipe(*overrides)
    engine = tiny.engine_for(asked, RANKS)
    run = Run(asked, RANKS, engine, None, {}, FOLDER / name, None, None, 99)  # type: ignore[arg-type]
    with closing(Saves(run, resumed)) as saves:
        yield saves


def after(saves: Saves, step: int, *, all_ready: bool = False) -> None:
    saves.after_update(Progress(step, RoutingState()), dict, all_ready=all_ready)


def saved(name: str) -> list[int]:
    """Updates of the complete checkpoints, the newest first, when all ranks have looked."""
    found = [step_of(folder) for folder in candidates(FOLDER / name / "checkpoints")]
    dist.barrier()
    return found


def failed_save_is_tried_again_before_the_next_is_due() -> None:
    for background in ("false", "true"):
        name = f"again-{background}"
        with saves_of(name, "checkpoint.every=20", f"checkpoint.background={background}") as saves:
            with files_of_at_most(20000, rank=1):
                after(saves, 20)
                wait_until(lambda: saves.ready)
            for step, expected in ((21, []), (22, []), (23, []), (24, [23]), (40, [23]), (41, [40, 23])):
                after(saves, step, all_ready=step in (21, 24, 41))
                assert saved(name) == expected, step
                wait_until(lambda: saves.ready or step not in (23, 40))


def last_save_is_tried_although_one_before_it_failed() -> None:
    with saves_of("last", "checkpoint.every=2", "checkpoint.background=true") as saves:
        with files_of_at_most(20000, rank=1):
            after(saves, 2)
            wait_until(lambda: saves.ready)
        saves.last(Progress(3, RoutingState()), {})
    assert saved("last") == [3]


def what_is_saved_is_not_saved_again() -> None:
    with saves_of("once", "checkpoint.every=2", "checkpoint.background=true") as saves:
        after(saves, 2)
        saves.last(Progress(2, RoutingState()), {})
        index = FOLDER / "once/checkpoints/step-00000002/index.json"
        written = index.stat().st_mtime_ns
        saves.last(Progress(2, RoutingState()), {})
        assert index.stat().st_mtime_ns == written
        dist.barrier()
    with saves_of("once", resumed=index.parent) as saves:  # a run that goes on from there and stops at once
        saves.last(Progress(2, RoutingState()), {})
        assert index.stat().st_mtime_ns == written
        dist.barrier()
    with saves_of("another", resumed=index.parent) as saves:
        saves.last(Progress(2, RoutingState()), {})
    assert saved("another") == [2]
    hidden = index.parent.with_name(".step-00000002.old-0")
    dist.barrier()
    if RANKS.is_first:
        index.parent.rename(hidden)
    with saves_of("once", resumed=hidden) as saves:  # found by the user, and no longer there as a checkpoint
        saves.last(Progress(2, RoutingState()), {})
    assert saved("once") == [2]


def what_a_resumed_run_leaves_behind_is_never_gone_on_from() -> None:
    with saves_of("branch", "checkpoint.keep=9") as saves:
        for step in (2, 4, 5):
            saves.last(Progress(step, RoutingState()), {})
    with saves_of("branch", "checkpoint.keep=9", resumed=FOLDER / "branch/checkpoints/step-00000002") as saves:
        saves.last(Progress(4, RoutingState()), {})
        assert saved("branch") == [4, 2]
        saves.last(Progress(6, RoutingState()), {})
    assert saved("branch") == [6, 4, 2]


CHECKS = [
    failed_save_is_tried_again_before_the_next_is_due,
    last_save_is_tried_although_one_before_it_failed,
    what_is_saved_is_not_saved_again,
    what_a_resumed_run_leaves_behind_is_never_gone_on_from,
]

if __name__ == "__main__":
    checks.run(CHECKS)
    dist.destroy_process_group()
