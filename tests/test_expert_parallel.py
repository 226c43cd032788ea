"""Experts over two ranks give what one rank gives, and only what must travel travels.

The checks run in two real processes, started once: tests/programs/expert_parallel_checks.py.
"""

from __future__ import annotations

import pytest
from programs.checks import expect, start

CHECKS = [
    "uneven_splits",
    "rank_that_sends_nothing",
    "nobody_sends_anything",
    "everything_to_the_other_rank",
    "layer_equals_one_rank_dropless",
    "layer_equals_one_rank_with_capacity",
    "layer_equals_one_rank_when_recomputed",
    "one_rank_gets_every_token",
    "no_token_reaches_an_ffn_expert",
    "evaluation_needs_no_gradient",
    "only_kept_ffn_assignments_travel",
    "rank_order_is_checked",
    "experts_are_marked_and_nothing_else",
    "parameter_groups_partition_the_model",
    "large_expert_groups_are_split",
    "unpartitioned_model_is_refused",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    log = tmp_path_factory.mktemp("expert_parallel") / "log.txt"
    return start("tests.programs.expert_parallel_checks", world=2, log=log)


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(results: dict[str, str], name: str) -> None:
    expect(results, name)


@pytest.mark.dist
def test_every_check_is_named_here(results: dict[str, str]) -> None:
    assert list(results) == CHECKS
