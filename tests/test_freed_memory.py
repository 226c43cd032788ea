"""Freed memory is taken again without page faults, counted by the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

COUNT = """
import resource
import torch
from moepp_ds.freed_memory import keep_freed_memory
{first}

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**26)  # 256 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
def test_memory_is_taken_again_without_page_faults() -> None:
    assert page_faults("pass") > 100  # 65,536 pages of 4 KiB, or 128 of 2 MiB
    assert page_faults("keep_freed_memory()") < 10


def page_faults(first: str) -> int:
    """Of zeroing 256 MiB a second time, in a process that begins with this line."""
    command = [sys.executable, "-c", COUNT.format(first=first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)
