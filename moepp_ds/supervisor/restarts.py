"""Attempt after attempt, until the run is complete, stopped, or given up.

1. With several hosts, agree who takes part (`roll`).
2. Run the ranks to their end (`job`), and judge it (`verdict`).
3. After a failure that another start may help: wait 1, 2, 4, ... 60 seconds and start again, from the newest valid
   checkpoint. A failure after progress, a newer step in `latest` or status.json than ever before, is the first one
   again; after `max_restarts` failures in a row without any the run is given up. A run that was told to go back to an
   earlier checkpoint counts from there.

What is said of the run is said in its log.txt, too; and of a failed one in status.json, where rank 0 may have known
nothing of it, or been killed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.locks import holder, is_free
from moepp_ds.config import RecipeError
from moepp_ds.freed_memory import unsplit_memory
from moepp_ds.output import print_line
from moepp_ds.status import time_now, write_status
from moepp_ds.supervisor.attempt import read_record
from moepp_ds.supervisor.job import Graces, Job, NotStarted, StopRequest
from moepp_ds.supervisor.processes import RUN_VARIABLE, marked_processes
from moepp_ds.supervisor.roll import Place, Roll, RollError
from moepp_ds.supervisor.verdict import FAILED, STOPPED, Verdict, judge, stamp

LONGEST_PAUSE = 60.0

# Left over from a launcher around this one, these would make every process look like a rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")


@dataclass(frozen=True)
class Rules:
    """What is looked after, and how patiently."""

    run_dir: Path
    graces: Graces
    max_restarts: int
    """Failures in a row without progress that are followed by another start."""
    resume: str
    """What --resume says for the first start."""


Command = Callable[[str, Place | None], Sequence[str]]
"""The command line of a start: what it resumes, and this host's place when there are several. Raises NotStarted."""


def supervise(rules: Rules, command: Command, roll: Roll | None = None) -> int:
    """Look after a run to its end under this process's signal handlers; return the exit code."""
    stop = StopRequest()
    stop.listen()
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    environment |= {"MOEPP_SUPERVISOR_PID": str(os.getpid()), RUN_VARIABLE: _mark(rules, roll)}
    environment |= unsplit_memory(environment)
    latest = rules.run_dir / "checkpoints" / "latest"
    before, best, failures = stamp(latest), steps_done(rules.run_dir), 0
    resume = rules.resume
    # `--resume none` is refused where there is a run, so nothing may start it with `auto`
    begins = resume == "none" and before is None and not (rules.run_dir / "metrics.jsonl").exists()
    if not _earlier_ranks_ended(rules, roll, stop):
        return _stopped(rules, roll)
    while True:
        verdict = _attempt(rules, command, resume, roll, environment, stop)
        done, has_moved = steps_done(rules.run_dir), stamp(latest) != before
        if verdict.code == STOPPED and verdict.reason and _is_stuck(rules, roll):
            words = f"{verdict.words}; so did the stop before it, and nothing was saved between: see to that first"
            verdict = replace(verdict, code=FAILED, words=words)
        _say(rules, verdict.words)
        if resume not in ("auto", "none") and has_moved:  # it went on from where it was told to
            best = 0
        failures = 1 if done > best else failures + 1
        best = max(best, done)
        verdict = _whether_again(rules, verdict, failures, roll)
        if not verdict.restart:
            return verdict.code
        pause = pause_after(failures)
        _say(rules, f"restart {failures} of at most {rules.max_restarts} without progress, in {pause:g} s")
        if stop.sleep(pause):
            return _stopped(rules, roll)
        # A checkpoint of another place is where to begin until this run has one of its own.
        resume = "auto" if begins or has_moved else rules.resume


def _attempt(
    rules: Rules, command: Command, resume: str, roll: Roll | None, environment: dict[str, str], stop: StopRequest
) -> Verdict:
    """One start of the ranks, from its agreement among the hosts to the last process's end."""
    place = None
    if roll is not None:
        try:
            place = roll.join(stop, resume)
        except (RollError, RecipeError) as error:
            roll.leave()
            return Verdict(error.code if isinstance(error, RollError) else FAILED, f"not started: {error}")
        except OSError as error:  # of the file system, which may have recovered at the next start
            roll.leave()
            return Verdict(FAILED, f"not started: {error}", restart=True)
        if place is None:
            return Verdict(STOPPED, "stopped before training began; start it again with --resume auto")
        names = ", ".join(host.name for host in place.hosts)
        _say(rules, f"attempt {place.attempt}: host {place.node_rank} of {names}; {place.world} ranks")
        resume = place.resume
    status_file = rules.run_dir / "status.json"
    earlier = stamp(status_file)
    try:
        words = command(resume, place)
        ending = Job(rules.graces, stop, roll.trouble if roll else lambda: None).run(words, environment)
    except NotStarted as error:
        return Verdict(FAILED, f"failed: {error}, so no rank was started", restart=True)
    # A file that an earlier start left does not count.
    status = read_record(status_file) if stamp(status_file) != earlier else None
    verdict = judge(ending, status)
    if status is not None and verdict.reason and (place is None or place.node_rank == 0):
        _note_failure(rules.run_dir, status, verdict.reason)
    return verdict


def _note_failure(run_dir: Path, status: Mapping[str, object], reason: str) -> None:
    """Say in status.json that an attempt failed, and why, now that none of its processes is left."""
    step, checkpoint, restart = (status.get(key) for key in ("step", "checkpoint", "restart"))
    with suppress(OSError):  # on a full disk what rank 0 said stays
        write_status(
            run_dir,
            "failed",
            step=step if isinstance(step, int) else 0,
            message=reason,
            checkpoint=checkpoint if isinstance(checkpoint, str) else None,
            restart=restart if isinstance(restart, bool) else None,
        )


def _whether_again(rules: Rules, verdict: Verdict, failures: int, roll: Roll | None) -> Verdict:
    """The verdict, without a restart where there has been no progress for too long, or another host forbids it."""
    again = verdict.restart and failures <= rules.max_restarts
    if verdict.restart and not again and rules.max_restarts:
        what = "given up" if verdict.code == FAILED else "not started again here"
        _say(rules, f"{what}: {failures} failures in a row without progress (--max_restarts)")
    final = None
    if roll is not None:
        try:
            roll.end(verdict.code, verdict.words, restart=again)
            final = roll.ended_for_good()
        except OSError as error:  # the other hosts see this one fall silent, or their ranks end
            _say(rules, f"warning: {error}; the other hosts were not told")
    if again and final is not None:
        _say(rules, f"not started again: host {final.host}: {final.words}")
        return Verdict(final.code, verdict.words)
    return replace(verdict, restart=again)


def _stopped(rules: Rules, roll: Roll | None) -> int:
    words = "stopped while it waited to start; continue with --resume auto"
    if roll is not None:
        with suppress(OSError):  # the other hosts see this one fall silent
            roll.end(STOPPED, words, restart=False)
    _say(rules, words)
    return STOPPED


def _earlier_ranks_ended(rules: Rules, roll: Roll | None, stop: StopRequest) -> bool:
    """Wait for ranks whose supervisor was killed, and which save before they end; False when a stop came first.

    In vain as long as a stop may take: the start then says who trains there. On several hosts each waits for its own.
    """

    def somebody() -> str:
        lock = rules.run_dir / ".lock"
        if roll is None and lock.exists() and not is_free(lock):
            return holder(lock)
        found = marked_processes(_mark(rules, roll))
        return f"process {', '.join(map(str, found))} of an earlier supervisor" if found else ""

    end, who = time.monotonic() + rules.graces.stop, somebody()
    if who:
        _say(rules, f"waiting up to {rules.graces.stop:g} s for {who}, which still trains here")
    while somebody() and time.monotonic() < end:
        if roll is not None:
            roll.stay()
        if stop.sleep(0.5):
            return False
    return not stop.asked


def _is_stuck(rules: Rules, roll: Roll | None) -> bool:
    """Whether a stop that met a failure is the second one in a row without a save; notes the first.

    A job that comes back to its queue by itself would come back for ever, as on a disk that stays full, where there may
    be no room for the note either.
    """
    note = rules.run_dir / f".unsaved-stop{'-' + roll.own if roll else ''}"
    writing = f"{stamp(rules.run_dir / 'checkpoints' / 'latest')}\n"
    try:
        if note.exists() and note.read_text() == writing:
            return True
        note.write_text(writing)
    except OSError:
        return True
    return False


def _mark(rules: Rules, roll: Roll | None) -> str:
    """What the processes of this run on this host have in their environment; two hosts may be one machine."""
    return f"{rules.run_dir.resolve()}@{roll.own if roll else ''}"


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4, ... 60, however many there are."""
    return min(2.0 ** min(failures - 1, 10), LONGEST_PAUSE)


def steps_done(run_dir: Path) -> int:
    """The newest update that `latest` or status.json tells of; 0 if neither does."""
    status = read_record(run_dir / "status.json") or {}
    step = status.get("step")
    try:
        latest = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8", errors="replace")
    except OSError:
        latest = ""
    saved = re.fullmatch(r"step-(\d+)", latest.strip())
    return max(step if isinstance(step, int) else 0, int(saved[1]) if saved else 0)


def _say(rules: Rules, words: str) -> None:
    now = time_now()
    # one write, so that it does not tear another host's line; there may be no folder yet, or no room
    with suppress(OSError), (rules.run_dir / "log.txt").open("ab", buffering=0) as log:
        log.write(f"{now}  [train] {words}\n".encode())
    print_line(f"[train] {now} {rules.run_dir}: {words}")
