"""Checks of moepp_ds.agreement in three real ranks; tests/test_agreement.py starts them."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moepp_ds.agreement import AgreedError, FinalError, all_or_none, gather
from tests.programs import checks

dist.init_process_group("gloo")
RANK = dist.get_rank()


def values_come_by_rank() -> None:
    assert gather({"rank": RANK}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def nobody_fails() -> None:
    with all_or_none():
        done = True
    assert done


def one_fails() -> None:
    """All raise the same; the one that failed says from what."""
    with pytest.raises(AgreedError) as caught:
        with all_or_none():
            if RANK == 1:
                raise KeyError("missing")
    assert str(caught.value) == "rank 1: KeyError: 'missing'"
    assert isinstance(caught.value.__cause__, KeyError) == (RANK == 1)


def two_fail_alike_and_all_fail_alike() -> None:
    with pytest.raises(LookupError, match="^ranks 0, 2: not here$"):
        with all_or_none(LookupError):
            if RANK != 1:
                raise LookupError("not here")
    with pytest.raises(LookupError, match="^not here$"):
        with all_or_none(LookupError):
            raise LookupError("not here")


def all_fail_differently() -> None:
    with pytest.raises(AgreedError, match="^ranks 0, 1: even 0\nrank 2: even 1$"):
        with all_or_none():
            raise OSError(f"even {RANK // 2}")


def faults_of_the_input_alone_are_final() -> None:
    with pytest.raises(FinalError, match="^ranks 1, 2: no such key$"):
        with all_or_none():
            if RANK:
                raise ValueError("no such key")
    with pytest.raises(AgreedError, match="^rank 0: stale\nrank 2: no such key$") as caught:
        with all_or_none():
            if RANK != 1:
                raise ValueError("no such key") if RANK else OSError("stale")
    assert not isinstance(caught.value, FinalError)


if __name__ == "__main__":
    alike_or_not = [two_fail_alike_and_all_fail_alike, all_fail_differently, faults_of_the_input_alone_are_final]
    checks.run([values_come_by_rank, nobody_fails, one_fails, *alike_or_not])
