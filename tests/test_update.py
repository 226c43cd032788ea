"""One update: what it returns is checked by the runs of test_train.py; here, what it does not take.

The checks run in real ranks: tests/programs/update_checks.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from programs.checks import expect, start

from moepp_ds.update import _on_device

CHECKS = [
    "skipped_updates_leave_no_trace",
    "an_incident_names_ranks_and_rows",
    "a_spike_names_every_micro_batch_that_has_a_share_in_it",
    "a_gradient_that_only_an_expert_has_is_said_to_be_one",
    "a_loss_scale_that_is_too_large_is_no_incident",
    "a_loss_that_is_no_number_says_nothing_about_the_scale",
    "the_lowest_scale_cannot_be_too_large_without_an_incident",
    "a_fixed_scale_cannot_be_too_large_without_an_incident",
    "the_guard_goes_from_update_to_update",
    "flags_of_all_ranks_come_together",
]
ONE_RANK = ["skipped_updates_leave_no_trace", "an_incident_names_ranks_and_rows", "flags_of_all_ranks_come_together"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_tokens_reach_the_device_as_int64(device: str, dtype: type[np.integer]) -> None:
    tokens_BS1 = np.arange(6, dtype=dtype).reshape(2, 3)
    on_device = _on_device(tokens_BS1, torch.device(device))
    assert (on_device.dtype, on_device.device.type) == (torch.int64, device)
    assert on_device.tolist() == tokens_BS1.tolist()


def run(factory: pytest.TempPathFactory, world: int, *names: str) -> dict[str, str]:
    folder = factory.mktemp("update")
    return start("tests.programs.update_checks", [str(folder), *names], world=world, log=folder / "log.txt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory, 1, *ONE_RANK)


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two_ranks: dict[str, str], name: str) -> None:
    expect(two_ranks, name)


@pytest.mark.dist
def test_every_check_is_named_here(two_ranks: dict[str, str]) -> None:
    assert list(two_ranks) == CHECKS, two_ranks.get("program")


@pytest.mark.dist
@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank(one_rank: dict[str, str], name: str) -> None:
    expect(one_rank, name)
