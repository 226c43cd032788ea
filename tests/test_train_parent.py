"""A run that loses who looks after it: the ranks save, say so, and nothing stays behind.

Killed with SIGKILL, a supervisor can tell nobody; the ranks have to see that it is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import GOLDEN_RECIPE, metrics, status

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

ENDLESS = ("parallel.expert_parallel=2", "train.max_steps=100000", "checkpoint.every=100000", "evaluation.every=100000")


class Supervised:
    """The golden recipe without an end, on two ranks under `moepp_ds.launcher`."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log = folder / "run", folder / "log.txt"
        command = [sys.executable, "-m", "moepp_ds.launcher", "--num_gpus", "2", GOLDEN_RECIPE]
        command += ["--run-dir", str(self.path), *(word for setting in ENDLESS for word in ("--set", setting))]
        with self.log.open("wb") as log:
            self.supervisor = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, stdout=log, stderr=log
            )

    def living(self, holding: str = "") -> list[int]:
        """Processes of this run, the supervisor aside, whose command line holds that, too."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
            except OSError:  # ended meanwhile
                continue
            if str(self.path) in words and holding in words:
                found.append(int(entry.name))
        return [pid for pid in found if pid != self.supervisor.pid]

    def until(self, reached: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"waited {seconds} s in vain:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def until_training(self) -> None:
        """Wait for the first updates."""
        record = self.path / "metrics.jsonl"
        self.until(lambda: record.exists() and record.read_bytes().count(b"\n") >= 3, 120)

    def check_saved(self, why: str) -> None:
        """Saved after the last update that was recorded, and marked as stopped, which nobody asked for."""
        done = status(self.path)
        step = done["step"]
        assert done == {"state": "stopped", "step": step, "message": why, "restart": True}
        assert 3 <= step == len(metrics(self.path))
        checkpoint = self.path / "checkpoints" / f"step-{step:08d}"
        assert (self.path / "checkpoints/latest").read_text() == f"{checkpoint.name}\n"
        assert len(list(checkpoint.glob("rank-*-of-00002.safetensors"))) == 2
        assert f"stopped after update {step} ({why})" in self.log.read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path)
    yield supervised
    supervised.supervisor.kill()
    supervised.supervisor.wait()
    for pid in supervised.living():
        os.kill(pid, signal.SIGKILL)


def test_ranks_save_and_stop_when_their_supervisor_is_killed(run: Supervised) -> None:
    run.until_training()
    run.supervisor.kill()
    run.supervisor.wait()
    run.until(lambda: not run.living(), 60)
    run.check_saved("its supervisor is gone")


def test_ranks_save_and_stop_when_deepspeeds_launcher_is_killed(run: Supervised) -> None:
    """Their parent; the supervisor lives on and sees them end as after a stop."""
    run.until_training()
    (parent,) = run.living("deepspeed.launcher.launch")
    os.kill(parent, signal.SIGKILL)
    assert run.supervisor.wait(120) == 75, run.log.read_text()[-3000:]
    assert run.living() == []
    run.check_saved("its launcher is gone")
