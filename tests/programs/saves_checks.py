"""Checks of when a run is saved, in real ranks; tests/test_saves.py starts them.

    ... --module tests.programs.saves_checks FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import candidates, step_of
from moepp_ds.checkpoint.room import PARAMETER_BYTES
from moepp_ds.config import count_parameters
from moepp_ds.controller import RoutingState
from moepp_ds.monitor import RunFolder
from moepp_ds.run import Progress, Run
from moepp_ds.saves import Saves
from tests.programs import checks, tiny
from tests.programs.checkpoint_checks import FOLDER, RANKS, files_of_at_most, on_first, wait_until


@contextmanager
def saves_of(name: str, *overrides: str, resumed: Path | None = None) -> Iterator[Saves]:
    """The saves of a run of the tiny recipe that has no data; its folder has that name."""
    asked = tiny.recipe(*overrides)
    engine = tiny.engine_for(asked, RANKS)
    folder = RunFolder(FOLDER / name, tensorboard=False, resumed_step=0) if RANKS.is_first else None
    run = Run(asked, RANKS, engine, None, {}, FOLDER / name, folder, None, 99)  # type: ignore[arg-type]
    with closing(folder) if folder else nullcontext(), closing(Saves(run, resumed)) as saves:
        yield saves


def said(name: str, words: str) -> list[str]:
    """The lines that have the words in the log of a run, without their time, when all ranks are done."""
    dist.barrier()
    lines = (FOLDER / name / "log.txt").read_text().splitlines()
    dist.barrier()
    return [line.partition("  ")[2] for line in lines if words in line]


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


def what_a_run_goes_on_from_is_the_latest_before_it_saves() -> None:
    """So that a run that ends before its first save does not go on from what it has left behind."""
    with saves_of("back", "checkpoint.keep=9") as saves:
        for step in (2, 4, 5):
            saves.last(Progress(step, RoutingState()), {})
    root = FOLDER / "back/checkpoints"
    with saves_of("back", resumed=root / "step-00000002"):
        assert saved("back") == [2]
    line = "left behind: step-00000004, step-00000005; each is deleted once this run has saved one at or past it"
    with saves_of("back", resumed=root / "step-00000002"):
        pass
    assert said("back", "left behind") == [line]
    latest = root / "latest"
    on_first(lambda: (latest.unlink(), latest.mkdir()))
    with pytest.raises(CheckpointError, match="latest cannot be made to name step-00000002, which .*; make room or"):
        with saves_of("back", resumed=root / "step-00000002"):
            pass
    dist.barrier()
    assert sorted(path.name for path in root.iterdir()) == ["latest", *(f"step-0000000{step}" for step in (2, 4, 5))]


def milestones_are_kept() -> None:
    with saves_of("milestones", "checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_every=4") as saves:
        for step in range(2, 11, 2):
            saves.last(Progress(step, RoutingState()), {})
    assert saved("milestones") == [10, 8, 4]


def failures_are_not_told_again_and_again() -> None:
    """Of 20 tries in a row the first is told in full, and then the 2nd, the 4th, ...; after a save it begins anew."""
    with saves_of("told", "checkpoint.every=1") as saves:
        for first in (1, 41):
            with files_of_at_most(20000, rank=1):
                for step in range(first, first + 20):
                    after(saves, step, all_ready=step > first)
                    wait_until(lambda: saves.ready)
            after(saves, first + 20, all_ready=True)
            saves.last(Progress(first + 21, RoutingState()), {})
    told = said("told", "warning: no checkpoint of")
    assert "rank 1: " in told[0] and told[0].endswith("; training goes on, the next try is after update 3")
    numbers = [(2, 1), (3, 2), (5, 4), (9, 8), (17, 16)]
    again = [line.replace("for the same reason", "") for line in told[1:5]]
    assert again == [
        f"warning: no checkpoint of update {step}, , {tries} tries in a row; training goes on, the next try is after "
        f"update {step + 1}"
        for step, tries in numbers[1:]
    ]
    assert len(told) == 10, told


def room_for_checkpoints_is_foreseen() -> None:
    settings = ("checkpoint.keep=2", "checkpoint.keep_every=20", "checkpoint.every=10")
    asked = tiny.recipe(*settings)
    with saves_of("room", *settings) as saves:
        saves.last(Progress(1, RoutingState()), {})
    stored = sum(path.stat().st_size for path in (FOLDER / "room/checkpoints").glob("*/*.safetensors"))
    assert 0 <= stored - PARAMETER_BYTES * count_parameters(asked.model).total < 40000  # of headers
    (line,) = said("room", "a checkpoint takes about")
    assert line.startswith("a checkpoint takes about 0.2 MB, 7 of them 1.5 MB (checkpoint.keep 2, 4 milestones, "), line
    assert line.endswith("B are free"), line


CHECKS = [
    failed_save_is_tried_again_before_the_next_is_due,
    last_save_is_tried_although_one_before_it_failed,
    what_is_saved_is_not_saved_again,
    what_a_resumed_run_leaves_behind_is_never_gone_on_from,
    what_a_run_goes_on_from_is_the_latest_before_it_saves,
    milestones_are_kept,
    failures_are_not_told_again_and_again,
    room_for_checkpoints_is_foreseen,
]

if __name__ == "__main__":
    checks.run(CHECKS)
