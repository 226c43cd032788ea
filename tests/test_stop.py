"""Being asked to stop: by each signal, or by the death of whoever started the process or looks after it.

Everything happens in real processes; tests/programs/stop_signal.py says of itself what it was asked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import ROOT, kill_group

PROGRAM = [sys.executable, "-m", "tests.programs.stop_signal"]
CHILD_OF_ANOTHER = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *PROGRAM]


class Asked:
    """The program, started by `command`, which may stand between this process and it."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.started = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = int(self._read())

    def _read(self) -> str:
        assert self.started.stdout is not None
        return self.started.stdout.readline()

    def reason(self) -> str | None:
        """What the program says now. A signal sent before is handled before it reads the question."""
        assert self.started.stdin is not None
        self.started.stdin.write("?\n")
        self.started.stdin.flush()
        *words, asked, requested = self._read().split()
        reason = " ".join(words)
        assert (asked, requested) == (str(reason.startswith("SIG")), str(reason != "None"))
        return None if reason == "None" else reason


Start = Callable[..., Asked]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the program; `supervisor` is what it finds as MOEPP_SUPERVISOR_PID."""
    all_asked: list[Asked] = []

    def start_one(command: list[str] = PROGRAM, *, supervisor: int = 0) -> Asked:
        all_asked.append(Asked(command, {"MOEPP_SUPERVISOR_PID": str(supervisor)}))
        return all_asked[-1]

    yield start_one
    for asked in all_asked:
        kill_group(asked.started.pid)
        asked.started.communicate()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_remembered(start: Start, signum: signal.Signals) -> None:
    asked = start()
    assert asked.reason() is None
    os.kill(asked.pid, signum)
    assert asked.reason() == signum.name == asked.reason()


def test_a_second_signal_does_not_kill(start: Start) -> None:
    """While the last checkpoint is written, an impatient scheduler may say it again."""
    asked = start()
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(asked.pid, signum)
        assert asked.reason() == "SIGTERM"


def test_the_death_of_its_parent_is_noticed(start: Start) -> None:
    asked = start(CHILD_OF_ANOTHER)
    assert asked.pid != asked.started.pid
    assert asked.reason() is None
    asked.started.kill()
    asked.started.wait()
    assert asked.reason() == "its launcher is gone"
    os.kill(asked.pid, signal.SIGTERM)  # as its supervisor then does
    assert asked.reason() == "its launcher is gone"


def test_a_signal_to_everybody_is_no_death_of_the_launcher(start: Start) -> None:
    """SLURM sends SIGUSR1 to all processes of a job, and `deepspeed`'s launcher dies of it."""
    asked = start(CHILD_OF_ANOTHER)
    assert asked.reason() is None
    os.killpg(asked.started.pid, signal.SIGUSR1)
    asked.started.wait()
    assert asked.reason() == "SIGUSR1"


def test_the_death_of_its_supervisor_is_noticed(start: Start) -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    asked = start(supervisor=supervisor.pid)
    try:
        assert asked.reason() is None
    finally:
        supervisor.kill()
        supervisor.communicate()
    assert asked.reason() == "its supervisor is gone"


@pytest.mark.parametrize("supervisor", [0, 1], ids=["none", "process 1, which may be another user's"])
def test_nothing_asks_a_process_that_is_looked_after(start: Start, supervisor: int) -> None:
    asked = start(supervisor=supervisor)
    assert [asked.reason() for _ in range(3)] == [None] * 3


def test_without_a_supervisor_in_the_environment(start: Start) -> None:
    """As under plain `deepspeed`: the variable is not there at all."""
    asked = start(["env", "-u", "MOEPP_SUPERVISOR_PID", *PROGRAM])
    assert asked.reason() is None
    os.kill(asked.pid, signal.SIGUSR1)
    assert asked.reason() == "SIGUSR1"
