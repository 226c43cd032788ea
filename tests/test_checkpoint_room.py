"""moepp_ds.checkpoint.room: what is said of the room for checkpoints, before a run and when a save has failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from conftest import ROOT
from run_folders import GOLDEN_RECIPE
from small_disk import run_on_small_disk

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.room import Room, is_full
from moepp_ds.config import load_recipe

ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from moepp_ds.checkpoint.room import Room
from moepp_ds.config import load_recipe
run, recipe = Path(sys.argv[1]) / "run", sys.argv[2]
run.mkdir()
for keep, every in ((1, None), (3, None), (1, 10)):
    settings = [f"checkpoint.keep={keep}"] + [f"checkpoint.keep_every={every}"] * (every is not None)
    print(Room(run / "checkpoints", load_recipe(recipe, settings)).foreseen(50))
room = Room(run / "checkpoints", load_recipe(recipe))
print(room.advice())
for step in (4, 8, 12):
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text("{}")
(folder / "rank-0").write_bytes(bytes(1000000))
(run / "checkpoints/latest").write_text("step-00000008")
print(room.foreseen(50))
print(room.advice())
"""


def test_what_is_said(tmp_path: Path) -> None:
    """A checkpoint of the golden recipe takes 1.2 MB, the disk has 4.2."""
    disk = tmp_path / "disk"
    done = run_on_small_disk(disk, "4m", ON_A_SMALL_DISK, str(disk), str(ROOT / GOLDEN_RECIPE))
    assert done.returncode == 0, done.stderr
    enough, short, milestones, without, used, older = done.stdout.splitlines()
    assert enough.startswith("a checkpoint takes about ") and "(checkpoint.keep 1, and one that is being" in enough
    assert enough.endswith("4.2 MB are free")
    assert short.startswith("warning: a checkpoint takes about ") and short.endswith("or lower checkpoint.keep")
    assert milestones.startswith("warning: ") and "(checkpoint.keep 1, 5 milestones, and one" in milestones
    assert without.endswith("The run has no older checkpoint to delete: make room on its disk")
    assert "; 1.0 MB are used so far, 3.2 MB are free" in used
    run = disk / "run"
    assert f"3.2 MB are free in {run} (so a quota, or the number of files, is what is used up)" in older
    assert f"`moepp checkpoint prune {run} --keep 1`, or delete by hand what `latest` does not name: step-00" in older


def test_a_full_disk_is_told_by_words_that_all_ranks_have() -> None:
    for number, expected in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EFBIG, False)):
        error = OSError(number, os.strerror(number))
        assert is_full(CheckpointError(f"rank 3: x cannot be written: {error}")) == expected


def test_the_estimate_needs_no_folder(tmp_path: Path) -> None:
    assert "are free" in Room(tmp_path / "checkpoints", load_recipe(ROOT / GOLDEN_RECIPE)).foreseen(20)
