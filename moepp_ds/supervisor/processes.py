"""What lives in a session of processes, and how what has ended did, as /proc tells it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

RUN_VARIABLE = "MOEPP_SUPERVISED_RUN"
"""In the environment of what a supervisor starts: the run's folder, and this host's name among several."""


@dataclass(frozen=True)
class Process:
    """A living process of the session; `rank` is its number if it is one of the ranks."""

    pid: int
    rank: int | None


def session_processes(session: int) -> list[Process]:
    """List the living processes of a session. Zombies have ended, so they are left out.

    A rank is a process that has LOCAL_RANK in its environment and a parent that has not: a rank's own helpers
    inherit the variable, and `deepspeed.launcher.launch` sets it for its children alone.
    """
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            state, parent, _, of_session = fields[:4]
            if int(of_session) == session and state not in (b"Z", b"X"):
                parents[int(entry)] = int(parent)
    numbers = {pid: _rank_number(pid) for pid in parents}
    helpers = {pid for pid, parent in parents.items() if numbers.get(parent) is not None}
    return [Process(pid, None if pid in helpers else number) for pid, number in numbers.items()]


def marked_processes(mark: str) -> list[int]:
    """The living processes here that a supervisor of a run started, this one or one before it."""
    variable = f"{RUN_VARIABLE}={mark}".encode()
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if variable in _read_proc(pid, "environ").split(b"\0") and not has_ended(pid)]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or is a zombie: ended, and not yet waited for by its parent."""
    fields = _stat(pid)
    return not fields or fields[0] in (b"Z", b"X")


def exit_code(pid: int) -> int | None:
    """How a zombie ended: its exit code, or minus the signal that killed it. None once it has been waited for."""
    fields = _stat(pid)
    if not fields or fields[0] != b"Z":
        return None
    return os.waitstatus_to_exitcode(int(fields[-1]))  # field 52: the status as wait() will report it


def describe_exit(code: int) -> str:
    """A process's exit code in words; negative for the signal that killed it, as `subprocess` has it."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # a signal without a name, as a real-time one
        return f"killed by signal {-code}"


def send_signal(pid: int, signum: int) -> None:
    """Signal a process that may have ended meanwhile."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/pid/stat from the state on; empty when there is no such process."""
    # "pid (command) state parent group session ...", and a command may hold spaces and brackets
    return _read_proc(pid, "stat").rpartition(b")")[2].split()


def _rank_number(pid: int) -> int | None:
    variables = dict(item.partition(b"=")[::2] for item in _read_proc(pid, "environ").split(b"\0"))
    return int(variables.get(b"RANK", b"0")) if b"LOCAL_RANK" in variables else None


def _read_proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return b""
