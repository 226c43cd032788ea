"""Freed memory is taken again without page faults, counted by the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
from conftest import ROOT

from moepp_ds.freed_memory import unsplit_memory

COUNT = """
import resource
import torch
from moepp_ds.freed_memory import keep_freed_memory
{first}

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*(faults() for _ in range(60)))
"""

of_glibc = pytest.mark.skipif(sys.platform != "linux", reason="mallopt and its tunables are of glibc")


@of_glibc
def test_memory_is_taken_again_without_page_faults() -> None:
    assert min(page_faults("pass")) >= 32  # 16,384 pages of 4 KiB, or 32 of 2 MiB
    kept = page_faults("keep_freed_memory()")
    # not from the second time on: see unsplit_memory
    assert sum(kept[-20:]) < 10, kept


@of_glibc
def test_in_one_piece_it_is_taken_again_from_the_second_time_on() -> None:
    kept = page_faults("keep_freed_memory()", unsplit_memory({}))
    assert sum(kept[1:]) < 10, kept


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=8"}, {"GLIBC_TUNABLES": "glibc.rtld.nns=8:glibc.malloc.tcache_count=0"}),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}, {}),
    ],
)
def test_what_a_user_gave_stays(given: dict[str, str], added: dict[str, str]) -> None:
    assert unsplit_memory(given) == added


def page_faults(first: str, variables: Mapping[str, str] | None = None) -> list[int]:
    """Of zeroing 64 MiB, each of sixty times, in a process that begins with this line."""
    command = [sys.executable, "-c", COUNT.format(first=first)]
    others = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = {**others, **(variables or {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [int(count) for count in done.stdout.split()]
