"""Saves in the background, fingerprints, and damage at random places, in real ranks and on a disk that fills up.

The checks of several ranks are in tests/programs/saver_checks.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from programs.checks import expect, start
from small_disk import run_on_small_disk

CHECKS = [
    "background_save_is_of_the_moment_it_was_asked_for",
    "next_save_completes_the_one_before",
    "failed_background_save_is_known_to_all_ranks_when_it_is_completed",
    "old_ones_are_deleted_while_training_goes_on",
    "closed_before_it_is_complete_is_not_published",
    "where_no_thread_can_be_had",
    "exchanged_experts_are_named",
    "no_changed_byte_loads_silently",
    "all_damage_is_listed",
    "only_fp32_is_stored",
]


def run(folder: Path, corruptions: int) -> dict[str, str]:
    arguments = [str(folder), str(corruptions)]
    return start("tests.programs.saver_checks", arguments, world=2, log=folder / "log.txt")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("saver"), 60)


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_saver(checked: dict[str, str], name: str) -> None:
    expect(checked, name)


@pytest.mark.dist
def test_every_check_is_named_here(checked: dict[str, str]) -> None:
    assert list(checked) == CHECKS


@pytest.mark.dist
@pytest.mark.slow
def test_five_hundred_changed_bytes(tmp_path: Path) -> None:
    expect(run(tmp_path, 500), "no_changed_byte_loads_silently")


ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import candidates
from moepp_ds.checkpoint.live import Saver
from moepp_ds.checkpoint.verify import find_damage
from moepp_ds.engine import join_ranks
from tests.programs import tiny

disk, ranks = Path(sys.argv[1]), join_ranks()
asked = tiny.recipe()
engine = tiny.engine_for(asked, ranks)
for step, background in ((1, False), (2, True)):
    saver = Saver(engine, disk, keep=9, background=background)
    if step == 1:
        saver.save(step=0, facts={"data": None})
        saver.complete()
    tiny.train(engine, asked, ranks, [step])  # the run is alive
    try:
        saver.save(step=step, facts={"data": None})
        saver.complete()
    except CheckpointError as error:
        print(error)
    saver.close()
    assert sorted(path.name for path in disk.iterdir()) == ["latest", "step-00000000"]
    assert candidates(disk) == [disk / "step-00000000"] and not find_damage(disk / "step-00000000")
"""


def test_full_disk_leaves_the_checkpoint_before_and_the_run(tmp_path: Path) -> None:
    """A checkpoint of 240 KB on a disk that has room for one."""
    done = run_on_small_disk(tmp_path / "disk", "400k", ON_A_SMALL_DISK, str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("no checkpoint")]
    assert len(said) == 2
    for step, line in enumerate(said, start=1):
        assert line.startswith(f"no checkpoint of update {step}: ")
        assert "cannot be written" in line and "No space left on device" in line
