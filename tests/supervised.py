"""Supervisors under test: started, watched, and nothing of them left behind when a test ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT


class Running:
    """A supervisor under test, its run folder, its output, and every process that mentions that folder."""

    def __init__(self, command: list[str], run_dir: Path, env: dict[str, str]) -> None:
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def said(self) -> list[str]:
        """The supervisor's own lines, without the run folder and without the commands it started."""
        return lines_of_supervisor(self.output, self.run_dir)

    def living(self) -> list[int]:
        """Ids of processes, the supervisor aside, that have the run folder in their command line."""
        return [pid for pid in mentioning(str(self.run_dir)) if pid not in (os.getpid(), self.process.pid)]

    def until(self, reached: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until something is so; fail with the output when it does not come to be."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"waited {seconds} s in vain; output:\n{self.output[-4000:]}"
            time.sleep(0.05)

    def until_training(self, steps: int = 10) -> None:
        """Wait until both ranks have started and rank 0 has made some steps."""
        metrics = self.run_dir / "metrics.jsonl"
        self.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= steps)
        self.until((self.run_dir / "rank1.pid").exists)

    def rank_pid(self, rank: int) -> int:
        return int((self.run_dir / f"rank{rank}.pid").read_text())

    def state(self) -> str:
        return str(json.loads((self.run_dir / "status.json").read_text())["state"])

    def code(self, seconds: float = 60.0) -> int:
        return self.process.wait(timeout=seconds)


Start = Callable[..., Running]


def mentioning(words: str) -> list[int]:
    """Processes that have these words in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and words.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass  # ended meanwhile
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command whose run folder is tmp_path/run; kill it and all it left when the test ends."""
    started: list[Running] = []

    def start_one(command: list[str], env: dict[str, str]) -> Running:
        started.append(Running(command, tmp_path / "run", env))
        return started[-1]

    yield start_one
    for running in started:
        running.process.kill()
        running.process.wait()
        for pid in running.living():
            os.kill(pid, signal.SIGKILL)


def lines_of_supervisor(output: str, run_dir: Path) -> list[str]:
    """What a supervisor of `run_dir` says of it among other lines, without time and folder."""
    head = rf"\[train\] \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}} {re.escape(str(run_dir))}: (.*)"
    return re.findall(rf"(?m)^{head}$", output)
