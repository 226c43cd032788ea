"""What this project assumes of DeepSpeed, an assumption a check: a new version that moves one fails here.

The checks run in real ranks under the real launcher, each start going through the expert-parallel sizes that its
world allows: tests/programs/contract_checks.py.
"""

from __future__ import annotations

import pytest
from programs.checks import expect, start

CHECKS = [
    "experts_are_recognised",
    "layers_join_their_groups",
    "expert_parallel_ranks_are_consecutive",
    "unknown_json_keys_pass_in_silence",
    "updates_are_counted",
    "optimizer_has_the_parts_we_read",
    "fragments_tile_every_parameter",
    "masters_reach_the_weights_through_update_lp_params",
    "gradients_equal_plain_torch",
    "small_buckets_change_nothing",
    "norm_counts_every_expert_once",
    "clipping_scales_every_gradient",
    "nan_gradient_skips_the_update_in_fp32",
    "nan_gradient_skips_the_update_in_bf16",
    "updates_equal_plain_torch",
]
ONE_RANK = ["updates_are_counted", "fragments_tile_every_parameter", "updates_equal_plain_torch"]
FOUR_RANKS = ["expert_parallel_ranks_are_consecutive", "norm_counts_every_expert_once", "updates_equal_plain_torch"]
"""Two copies of the experts, each on two ranks: the one world here in which both kinds of groups have two ranks."""


def run(
    factory: pytest.TempPathFactory, world: int, names: list[str], launcher: str = "torchrun"
) -> dict[str, str]:
    log = factory.mktemp("contract") / "log.txt"
    return start("tests.programs.contract_checks", names, world=world, log=log, launcher=launcher)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory, 2, [], "deepspeed")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory, 1, ONE_RANK)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory, 4, FOUR_RANKS)


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two_ranks: dict[str, str], name: str) -> None:
    expect(two_ranks, name)


@pytest.mark.dist
def test_every_check_is_named_here(two_ranks: dict[str, str]) -> None:
    assert list(two_ranks) == CHECKS


@pytest.mark.dist
@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank(one_rank: dict[str, str], name: str) -> None:
    expect(one_rank, name)


@pytest.mark.dist
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(four_ranks: dict[str, str], name: str) -> None:
    expect(four_ranks, name)
