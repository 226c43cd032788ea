"""A disk of a few kilobytes that really fills up: a tmpfs that only one child process sees."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'


@cache
def _unshare() -> tuple[str, ...] | None:
    """The command that makes a mount namespace, as root or in a user namespace of one's own."""
    for command in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        try:
            if subprocess.run([*command, "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True).returncode == 0:
                return command
        except OSError:
            return None
    return None


def run_on_small_disk(disk: Path, size: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program to which the folder `disk` is a disk of `size` ("256k"); skip where that is not allowed."""
    unshare = _unshare()
    if unshare is None:
        pytest.skip("NOT RUN: this system lets no process have mounts of its own, so there is no disk to fill")
    disk.mkdir(exist_ok=True)
    command = [*unshare, "sh", "-c", _MOUNT, "sh", size, str(disk), sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=os.environ)
