"""When a run is saved, and what becomes of a save that fails; the checks are in tests/programs/saves_checks.py."""

from __future__ import annotations

import pytest
from programs.checks import expect, start

CHECKS = [
    "failed_save_is_tried_again_before_the_next_is_due",
    "last_save_is_tried_although_one_before_it_failed",
    "what_is_saved_is_not_saved_again",
    "what_a_resumed_run_leaves_behind_is_never_gone_on_from",
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
