"""How an attempt ended, in words: `status.json`, which rank 0 writes, against what was seen of the processes.

status.json: {"state": "running|completed|stopped|failed", "step": n, "message": text}, and "restart": false where
another start would fail in the same way. The run ended as it says there, whatever the launcher's exit code. What rank 0
cannot say there, since training has not begun or another rank alone has failed, a rank's own exit code says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moepp_ds.supervisor.job import Ending
from moepp_ds.supervisor.processes import describe_exit

COMPLETED, FAILED, STOPPED = 0, 1, 75  # 75 is sysexits.h's EX_TEMPFAIL: nothing is wrong, try again

FAILED_FOR_GOOD = 78
"""Of a rank, never of a supervisor: another start would fail in the same way. sysexits.h's EX_CONFIG."""


@dataclass(frozen=True)
class Verdict:
    """The exit code that stands for it, one line of words, and whether another start may help."""

    code: int
    words: str
    restart: bool = False


def judge(ending: Ending, status: Mapping[str, object] | None) -> Verdict:
    """Say how an attempt ended; `status` is what its rank 0 left in status.json, None when it left nothing."""
    late = f" ({ending.killed} processes did not end in time and were killed)" if ending.killed else ""
    cause = _cause(ending)
    # the launcher passes on the code of the first rank that it missed, where no end was seen here
    again = FAILED_FOR_GOOD not in (ending.launcher_code, *(end.code for end in ending.first_ended))
    if status is None:
        if ending.stop_asked:  # nothing was trained, so nothing is lost, however the processes ended
            return Verdict(STOPPED, f"stopped before training began; start it again with --resume auto{late}")
        if not ending.ranks_started:
            words = f"failed: the launcher ended with code {ending.launcher_code}, no rank was started{cause}{late}"
            return Verdict(FAILED, words)
        words = f"failed before training began, with code {ending.launcher_code}; the reason is above{cause}{late}"
        return Verdict(FAILED, words, restart=again)
    state, step, message = status.get("state"), status.get("step"), status.get("message") or ""
    told = f": {message}" if message else ""
    if state == "completed":
        return Verdict(COMPLETED, f"completed at step {step}{told}{late}")
    if state == "stopped":
        return Verdict(STOPPED, f"stopped at step {step}{told}; continue with --resume auto{late}")
    again = again and status.get("restart") is not False and not ending.stop_asked
    if state == "failed":
        return Verdict(FAILED, f"failed at step {step}{told}{cause}{late}", restart=again)
    return Verdict(FAILED, f"failed: ended at step {step} in state {state!r}{cause}{late}", restart=again)


def _cause(ending: Ending) -> str:
    """What ended first, here or on another host."""
    if ending.elsewhere is not None:
        return f"; {ending.elsewhere}"
    ends = (
        f"; rank {end.rank} ended first" + (f", {describe_exit(end.code)}" if end.code is not None else "")
        for end in ending.first_ended
    )
    return "".join(ends)


def stamp(path: Path) -> tuple[int, int] | None:
    """Identify one writing of a file: a rename over it changes the inode, a write its time."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
