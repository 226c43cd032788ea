"""moepp_ds.supervisor.verdict: how an attempt ended, from status.json and what was seen of the processes."""

from __future__ import annotations

import re

import pytest

from moepp_ds.supervisor.job import Ending, RankEnd
from moepp_ds.supervisor.verdict import COMPLETED, FAILED, STOPPED, Verdict, judge


def ending(**changes: object) -> Ending:
    usual: dict[str, object] = {"launcher_code": 0, "ranks_started": 2, "first_ended": (), "elsewhere": None}
    usual |= {"stop_asked": False, "launcher_killed": False, "killed": 0}
    return Ending(**{**usual, **changes})  # type: ignore[arg-type]


def reason_in(says: str) -> str:
    """What status.json is to say: the line without the step, and without who was killed for being late."""
    failed = r"(?:failed at step 4|stopped at step 4 by a failure)"
    found = re.fullmatch(failed + r": (.*?)(; --resume.*| \(\d processes .*)?", says)
    return found[1] if found else ""


RUNNING = {"state": "running", "step": 4}


@pytest.mark.parametrize(
    ("seen", "status", "code", "says"),
    [
        (ending(), {"state": "completed", "step": 9}, COMPLETED, "completed at step 9"),
        # the marker counts, not the launcher's exit code
        (ending(launcher_code=143), {"state": "completed", "step": 9}, COMPLETED, "completed at step 9"),
        (
            ending(stop_asked=True),
            {"state": "stopped", "step": 8},
            STOPPED,
            "stopped at step 8; continue with --resume auto",
        ),
        # nobody asked this supervisor: another host's was asked, or a rank was
        (ending(), {"state": "stopped", "step": 8}, STOPPED, "stopped at step 8; continue with --resume auto"),
        (
            ending(stop_asked=True),
            None,
            STOPPED,
            "stopped before training began; start it again with --resume auto",
        ),
        (
            ending(launcher_code=2, ranks_started=0),
            None,
            FAILED,
            "failed: the launcher ended with code 2, no rank was started",
        ),
        (
            ending(),
            {"state": "failed", "step": 4, "message": "no such row", "restart": False},
            FAILED,
            "failed at step 4: no such row",
        ),
        # a rank has found what every start would find, whatever rank 0 says, or before it says anything
        (
            ending(first_ended=(RankEnd(0, 1), RankEnd(1, 78)), launcher_code=1),
            {"state": "failed", "step": 4, "message": "rank 0 waited in vain", "restart": True},
            FAILED,
            "failed at step 4: rank 0 waited in vain; rank 0 ended first, with exit code 1; rank 1 ended first, with "
            "exit code 78",
        ),
        # who missed another rank is not the cause
        (
            ending(first_ended=(RankEnd(0, 76), RankEnd(1, 78)), launcher_code=76),
            {"state": "failed", "step": 4, "message": "rank 0 lost the connection", "restart": True},
            FAILED,
            "failed at step 4: rank 1 ended first, with exit code 78; rank 0 says: rank 0 lost the connection",
        ),
        (
            ending(first_ended=(RankEnd(1, 78),), launcher_code=78),
            RUNNING,
            FAILED,
            "failed at step 4: rank 1 ended first, with exit code 78",
        ),
        (
            ending(launcher_code=78),
            None,
            FAILED,
            "failed before training began: with code 78; the reason is above",
        ),
        (  # argparse's, of options that the program does not know
            ending(launcher_code=2, first_ended=(RankEnd(0, 2), RankEnd(1, 2))),
            None,
            FAILED,
            "failed before training began: ranks 0, 1 ended first, with exit code 2; the reason is above",
        ),
        (
            ending(launcher_killed=True, stop_asked=True),
            {"state": "stopped", "step": 8, "message": "SIGTERM"},
            STOPPED,
            "stopped at step 8: SIGTERM; continue with --resume auto",
        ),
        (
            ending(stop_asked=True, killed=3),
            RUNNING,
            STOPPED,
            "stopped at step 4 by a failure: it ended in state 'running', and how was not seen; --resume auto goes on "
            "from the newest checkpoint (3 processes did not end in time and were killed)",
        ),
        # a stop asked for while the others were waiting for a rank that was killed
        (
            ending(stop_asked=True, launcher_code=1, first_ended=(RankEnd(1, -9),)),
            RUNNING,
            STOPPED,
            "stopped at step 4 by a failure: rank 1 ended first, killed by signal 9 (SIGKILL); --resume auto goes on "
            "from the newest checkpoint",
        ),
        # what every start would meet is no less so because a stop was asked for
        (
            ending(stop_asked=True),
            {"state": "failed", "step": 4, "message": "no such row", "restart": False},
            FAILED,
            "failed at step 4: no such row",
        ),
    ],
)
def test_what_is_not_started_again(seen: Ending, status: dict[str, object] | None, code: int, says: str) -> None:
    assert judge(seen, status) == Verdict(code, says, restart=False, reason=reason_in(says))


@pytest.mark.parametrize(
    ("seen", "status", "says"),
    [
        (ending(), {"state": "failed", "step": 4, "message": "nan"}, "failed at step 4: nan"),
        (
            ending(first_ended=(RankEnd(1, None),)),
            RUNNING,
            "failed at step 4: rank 1 ended first",
        ),
        (
            ending(first_ended=(RankEnd(1, -11),)),
            RUNNING,
            "failed at step 4: rank 1 ended first, killed by signal 11 (SIGSEGV)",
        ),
        (
            ending(first_ended=(RankEnd(0, 1), RankEnd(1, 1))),
            RUNNING,
            "failed at step 4: ranks 0, 1 ended first, with exit code 1",
        ),
        (
            ending(elsewhere="host b: rank 3 ended first", first_ended=(RankEnd(0, 1),)),
            RUNNING,
            "failed at step 4: host b: rank 3 ended first",
        ),
        (
            ending(launcher_code=1, first_ended=(RankEnd(1, -9),)),
            None,
            "failed before training began: rank 1 ended first, killed by signal 9 (SIGKILL); the reason is above",
        ),
        (  # all that is left have missed somebody
            ending(first_ended=(RankEnd(0, 76),)),
            {"state": "failed", "step": 4, "message": "rank 0 waited in vain"},
            "failed at step 4: rank 0 waited in vain; rank 0 ended first, as it missed another one",
        ),
    ],
)
def test_what_is_started_again(seen: Ending, status: dict[str, object] | None, says: str) -> None:
    assert judge(seen, status) == Verdict(FAILED, says, restart=True, reason=reason_in(says))


@pytest.mark.parametrize(
    ("seen", "status", "why"),
    [
        (ending(launcher_killed=True), {"message": "SIGTERM"}, "the deepspeed launcher was killed"),
        (ending(), {"message": "rank 3: its launcher is gone", "restart": True}, "rank 3: its launcher is gone"),
    ],
)
def test_a_stop_that_nobody_asked_for_is_started_again(seen: Ending, status: dict[str, object], why: str) -> None:
    says = f"stopped at step 8: {why}; continue with --resume auto"
    assert judge(seen, {"state": "stopped", "step": 8, **status}) == Verdict(STOPPED, says, restart=True)
