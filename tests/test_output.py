"""Lines that nobody can be given do not disturb who prints them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moepp_ds.output import print_line

PRINTS = """
import sys
from moepp_ds.output import flush_output, print_line
for number in range(2000):  # more than a buffer holds
    print_line(f"line {number}")
    print_line(f"error {number}", error=True)
flush_output()
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_full_disk_and_a_reader_that_is_gone(tmp_path: os.PathLike[str], where: str) -> None:
    read, write = os.pipe()
    os.close(read)
    mark = os.path.join(tmp_path, "mark")
    with open("/dev/full", "wb") as full:
        out = full if where == "full" else write
        done = subprocess.run([sys.executable, "-c", PRINTS, mark], stdout=out, stderr=out, timeout=60)
    os.close(write)
    assert done.returncode == 0
    assert os.path.exists(mark)


def test_lines_are_printed_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    print_line("seen")
    print_line("amiss", error=True)
    assert capfd.readouterr() == ("seen\n", "amiss\n")
