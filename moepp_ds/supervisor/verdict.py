"""How an attempt ended, in words: `status.json`, which rank 0 writes, against what was seen of the processes.

The run ended as it says there (`moepp_ds.status`), whatever the launcher's exit code. What rank 0 cannot say there,
since training has not begun or another rank alone has failed, a rank's own exit code says. What ended first comes
first: what rank 0 says may be no more than that it missed that one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moepp_ds.supervisor.job import Ending, RankEnd
from moepp_ds.supervisor.processes import describe_exit

COMPLETED, FAILED, STOPPED = 0, 1, 75  # 75 is sysexits.h's EX_TEMPFAIL: nothing is wrong, try again

MISSED_ANOTHER = 76
"""Of a rank that lost the connection to another one, or waited for it in vain. sysexits.h's EX_PROTOCOL."""

USAGE = 2
"""Of a rank: its command line is wrong, as argparse has it; no other start would find it right."""

FAILED_FOR_GOOD = 78
"""Of a rank, never of a supervisor: another start would fail in the same way. sysexits.h's EX_CONFIG."""


@dataclass(frozen=True)
class Verdict:
    """The exit code that stands for it, one line of words, and whether another start may help.

    reason: of a failed attempt of which status.json told: why, for status.json, where rank 0 may not have known it.
    """

    code: int
    words: str
    restart: bool = False
    reason: str = ""


def judge(ending: Ending, status: Mapping[str, object] | None) -> Verdict:
    """Say how an attempt ended; `status` is what its rank 0 left in status.json, None when it left nothing."""
    late = f" ({ending.killed} processes did not end in time and were killed)" if ending.killed else ""
    cause = _cause(ending)
    # the launcher passes on the code of the first rank that it missed, where no end was seen here
    codes = (ending.launcher_code, *(end.code for end in ending.first_ended))
    again = FAILED_FOR_GOOD not in codes and USAGE not in codes
    if status is None:
        if ending.stop_asked:  # nothing was trained, so nothing is lost, however the processes ended
            return Verdict(STOPPED, f"stopped before training began; start it again with --resume auto{late}")
        if not ending.ranks_started:
            words = f"failed: the launcher ended with code {ending.launcher_code}, no rank was started{late}"
            return Verdict(FAILED, words)
        words = cause or f"with code {ending.launcher_code}"
        return Verdict(FAILED, f"failed before training began: {words}; the reason is above{late}", restart=again)
    state, step, message = status.get("state"), status.get("step"), str(status.get("message") or "")
    told = f": {message}" if message else ""
    if state == "completed":
        return Verdict(COMPLETED, f"completed at step {step}{told}{late}")
    if state == "stopped":
        killed = ending.launcher_killed and not ending.stop_asked
        told = ": the deepspeed launcher was killed" if killed else told
        again = (killed or status.get("restart") is True) and not ending.stop_asked
        return Verdict(STOPPED, f"stopped at step {step}{told}; continue with --resume auto{late}", restart=again)
    again = again and status.get("restart") is not False
    if cause and message and (ending.elsewhere or 0 not in [end.rank for end in culprits(ending.first_ended)]):
        said = f"{cause}; rank 0 says: {message}"
    else:
        said = "; ".join(filter(None, (message, cause))) or f"it ended in state {state!r}, and how was not seen"
    if again and ending.stop_asked:  # as asked, if not cleanly; another start helps, but not before it is asked for
        words = f"stopped at step {step} by a failure: {said}; --resume auto goes on from the newest checkpoint{late}"
        return Verdict(STOPPED, words, reason=said)
    return Verdict(FAILED, f"failed at step {step}: {said}{late}", restart=again, reason=said)


def culprits(ended: Sequence[RankEnd]) -> list[RankEnd]:
    """Of ranks that ended together those that the others may have missed: killed ones, else those that missed none."""
    killed = [end for end in ended if (end.code or 0) < 0]
    return killed or [end for end in ended if end.code != MISSED_ANOTHER] or list(ended)


def _cause(ending: Ending) -> str:
    """What ended first, here or on another host."""
    if ending.elsewhere is not None:
        return ending.elsewhere
    ends: dict[int | None, list[int]] = {}
    for end in culprits(ending.first_ended):
        ends.setdefault(end.code, []).append(end.rank)
    return "; ".join(f"{_name_ranks(ranks)} ended first{_how(code)}" for code, ranks in ends.items())


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _how(code: int | None) -> str:
    if code is None:
        return ""
    return ", as it missed another one" if code == MISSED_ANOTHER else f", {describe_exit(code)}"


def stamp(path: Path) -> tuple[int, int] | None:
    """Identify one writing of a file: a rename over it changes the inode, a write its time."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
