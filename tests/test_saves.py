"""When a run is saved, and what becomes of a save that fails; the checks are in tests/programs/saves_checks.py."""

from __future__ import annotations

import pytest
from programs.checks import expect, start

from moepp_ds.config.training import CheckpointConfig

CHECKS = [
    "failed_save_is_tried_again_before_the_next_is_due",
    "last_save_is_tried_although_one_before_it_failed",
    "what_is_saved_is_not_saved_again",
    "what_a_resumed_run_leaves_behind_is_never_gone_on_from",
    "what_a_run_goes_on_from_is_the_latest_before_it_saves",
    "milestones_are_kept",
    "failures_are_not_told_again_and_again",
    "room_for_checkpoints_is_foreseen",
]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("saves")
    return start("tests.programs.saves_checks", [str(folder)], world=2, log=folder / "log.txt")


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_saves(checked: dict[str, str], name: str) -> None:
    expect(checked, name)


@pytest.mark.dist
def test_every_check_is_named_here(checked: dict[str, str]) -> None:
    assert list(checked) == CHECKS


def test_milestones_must_be_saved() -> None:
    assert CheckpointConfig(every=5, keep_every=20).keep_every == 20
    with pytest.raises(ValueError, match="keep_every 12 is not a multiple of every 5, .*; use 10, or another `every`"):
        CheckpointConfig(every=5, keep_every=12)
    with pytest.raises(ValueError, match="keep_every 2 is not a multiple of every 5, so .*; use 5, or another"):
        CheckpointConfig(every=5, keep_every=2)
