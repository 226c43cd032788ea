"""An optimizer on the host trains as one on the device and shares its checkpoints; and the plan of memory is true.

The checks run in real ranks: tests/programs/offload_checks.py.
"""

from __future__ import annotations

import pytest
from programs.checks import expect, start

CHECKS = [
    "offload_changes_no_loss",
    "many_buckets_lose_no_gradient",
    "resumes_on_the_host_and_back",
    "offloaded_is_digit_for_digit_again",
    "groups_are_those_of_the_engine",
    "plan_is_what_engines_take",
]


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checks' results on one rank, and on two with expert parallelism 2."""
    folder = tmp_path_factory.mktemp("offload")
    arguments = [str(folder)]
    return start("tests.programs.offload_checks", arguments, world=request.param, log=folder / "log.txt")


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_offload(ranks: dict[str, str], name: str) -> None:
    expect(ranks, name)
