"""Ranks that no longer agree are found and named: on four real ranks, tests/programs/consistency_checks.py."""

from __future__ import annotations

import pytest
from programs.checks import expect, start

CHECKS = [
    "ranks_that_agree_pass_in_every_layout",
    "a_replicated_parameter_of_one_rank",
    "elements_that_changed_places",
    "an_expert_of_one_replica",
    "a_master_that_is_not_the_weight",
    "a_count_of_updates",
    "rows_read_twice_or_left_out",
    "a_message_stays_short",
]


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    log = tmp_path_factory.mktemp("consistency") / "log.txt"
    return start("tests.programs.consistency_checks", world=4, log=log)


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_four_ranks(four_ranks: dict[str, str], name: str) -> None:
    expect(four_ranks, name)


@pytest.mark.dist
def test_every_check_is_named_here(four_ranks: dict[str, str]) -> None:
    assert list(four_ranks) == CHECKS
