"""Builds that are killed, for tests of what is left of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a set by name, but the locks."""
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != ".locks"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def moepp_data(*words: object) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "data_pipeline", *map(str, words)]


def run(commands: Sequence[list[str]]) -> float:
    """Run commands one after another, undisturbed; the seconds that they took."""
    start = time.monotonic()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def run_killed(
    commands: Sequence[list[str]], out: Path, *, expected: Path, seconds: float, kills: int, seed: int
) -> None:
    """Run `commands`, which build the set at `out`, with `kills` kills at random moments; check what comes out.

    Each time the first command is started, and the next when it has ended; within `seconds`, at a moment drawn by
    `seed`, the program that runs then or one of its workers is killed. Then everything is started again and takes
    up what is there. A run that ends before its moment has made the same bytes as the set `expected`, and the next
    begins with an empty folder. After the last kill all commands run undisturbed.
    """
    rng = random.Random(seed)
    while kills:
        if _killed(commands, moment=time.monotonic() + rng.uniform(0, seconds), rng=rng):
            kills -= 1
        else:
            assert contents(out) == contents(expected)
            shutil.rmtree(out)
    run(commands)
    assert contents(out) == contents(expected)


def _killed(commands: Sequence[list[str]], *, moment: float, rng: random.Random) -> bool:
    """Whether a kill hit before all commands had ended."""
    for command in commands:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(rng.choice([process.pid, *_workers(process.pid)]), signal.SIGKILL)
            process.communicate()
            return True
        assert process.returncode == 0, process.communicate()
    return False


def _workers(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
