"""One start of the `deepspeed` launcher on this host, until the last process it started is gone.

1. Start the launcher in a session of its own: the session lists whatever was started, whoever its parent is by now.
2. On a stop ask the ranks, and the ranks alone, by SIGTERM, to save and end. Above them stand the `deepspeed` runner,
   which would die and leave everything running, and its child `deepspeed.launcher.launch`, which would give each rank
   30 seconds and then kill it, checkpoint or not.
3. Ask them, too, when the launcher itself was killed: not all ranks see it, and the next start can go on from there.
4. Remember which rank ended first, and how: the others often end of that.
5. Wait until the session is empty. Who overstays is killed: `stop_grace` seconds after a stop, or after the launcher
   was killed; `exit_grace` seconds after the first rank ended, the launcher failed, or the attempt ended on another
   host: the ranks left may wait for those gone in a collective for ever.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from moepp_ds.supervisor.processes import Process, exit_code, has_ended, send_signal, session_processes

POLL_SECONDS, GLANCES = 0.2, 4
"""How often the session is listed, and how often its ranks are looked at meanwhile: to see which ended first, and how
before `deepspeed.launcher.launch`, which looks once a second, makes its zombie disappear."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class NotStarted(RuntimeError):
    """The launcher could not be started, for want of memory or of processes, say; another start may."""


class StopRequest:
    """Whether, and since when, this process is asked to stop; a second Ctrl-C is not to be waited for."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.kill_now = False

    def listen(self) -> None:
        """Take the signals from now on. They must not be blocked instead: children would inherit the mask."""
        for signum in STOP_SIGNALS:
            # SIGHUP that is ignored means nohup: the run is to outlive its terminal
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.kill_now = self.kill_now or (signum == signal.SIGINT and self.asked_at is not None)
        if self.asked_at is None:
            self.asked_at = time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self.asked_at is not None

    def sleep(self, seconds: float) -> bool:
        """Sleep so long or until a stop is asked for; return whether it was."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        return self.asked


@dataclass(frozen=True)
class Graces:
    """How long processes may take to end by themselves. Seconds."""

    stop: float
    """From a request to stop: the time a checkpoint may take."""
    exit: float
    """From the end of the first rank."""


@dataclass(frozen=True)
class RankEnd:
    """A rank that ended, and its exit code, minus the signal that killed it; None if that was not seen."""

    rank: int
    code: int | None


@dataclass(frozen=True)
class Ending:
    """What was seen of the processes while they ended."""

    launcher_code: int
    ranks_started: int
    first_ended: tuple[RankEnd, ...]
    """The ranks that were gone first; empty when none was missed before the end."""
    elsewhere: str | None
    """What ended the attempt on another host, if that was seen before a rank ended here."""
    stop_asked: bool
    launcher_killed: bool
    """Under living ranks, the launcher or its child, and by no signal that asks to stop."""
    killed: int
    """Processes that did not end by themselves in time."""


class Job:
    """The processes of one launch, from start to the last one's end.

    trouble: asked at every poll; says what has ended the attempt on another host, None while nothing has.
    """

    def __init__(self, graces: Graces, stop: StopRequest, trouble: Callable[[], str | None] = lambda: None) -> None:
        self._graces = graces
        self._stop = stop
        self._trouble = trouble
        self._asked: set[int] = set()
        self._killed: set[int] = set()
        self._ranks: dict[int, int] = {}
        self._first_ended: tuple[RankEnd, ...] = ()
        self._elsewhere: str | None = None
        self._ending_since: float | None = None
        self._launcher_gone_since: float | None = None
        self._launcher_killed = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> Ending:
        """Start the launcher and wait for the last process; meanwhile pass on a stop, kill who overstays.

        Raises NotStarted.
        """
        # A session of its own also keeps a terminal's Ctrl-C away from all but this process.
        try:
            launcher = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        except OSError as error:
            raise NotStarted(str(error)) from error
        while alive := session_processes(launcher.pid):
            self._ranks.update({process.pid: process.rank for process in alive if process.rank is not None})
            if launcher.poll() is not None:
                self._launcher_ended(launcher.returncode)
            self._ask_elsewhere()
            if self._stop.asked or self._launcher_gone_since is not None:
                self._ask_to_stop(alive)
            if self._overdue():
                for process in alive:
                    send_signal(process.pid, signal.SIGKILL)
                self._killed |= {process.pid for process in alive}
            self._watch_ranks()
        code = launcher.wait()
        return Ending(
            launcher_code=code,
            ranks_started=len(self._ranks),
            first_ended=self._with_code_of(code),
            elsewhere=self._elsewhere,
            stop_asked=self._stop.asked,
            launcher_killed=self._launcher_killed,
            killed=len(self._killed),
        )

    def _watch_ranks(self) -> None:
        """Pass the time until the next poll, looking out for the first end of a rank."""
        for _ in range(GLANCES):
            if not self._first_ended and not self._killed:
                gone = {pid: rank for pid, rank in self._ranks.items() if has_ended(pid)}
                if gone:
                    ends = (RankEnd(rank, exit_code(pid)) for pid, rank in gone.items())
                    self._first_ended = tuple(sorted(ends, key=lambda end: end.rank))
                    self._ending_since = self._ending_since or time.monotonic()
            time.sleep(POLL_SECONDS / GLANCES)

    def _launcher_ended(self, code: int) -> None:
        # The runner passes on the code of a rank that failed. It ends with 0 although ranks live when
        # `deepspeed.launcher.launch` was killed under it, and is itself killed by a signal.
        if code > 0:
            self._ending_since = self._ending_since or time.monotonic()
        elif self._launcher_gone_since is None:
            self._launcher_gone_since = time.monotonic()
            abandoned = any(not has_ended(pid) for pid in self._ranks)
            self._launcher_killed = abandoned and -code not in STOP_SIGNALS

    def _ask_elsewhere(self) -> None:
        trouble = self._trouble()
        if trouble is not None and self._elsewhere is None and not self._first_ended:
            self._elsewhere = trouble
            self._ending_since = time.monotonic()

    def _ask_to_stop(self, alive: Sequence[Process]) -> None:
        """Signal each rank once; while there has never been one, nothing is to save: signal everybody."""
        for process in alive:
            if process.pid not in self._asked and (process.rank is not None or not self._ranks):
                self._asked.add(process.pid)
                send_signal(process.pid, signal.SIGTERM)

    def _overdue(self) -> bool:
        limits = (
            (self._stop.asked_at, self._graces.stop),
            (self._launcher_gone_since, self._graces.stop),
            (self._ending_since, self._graces.exit),
        )
        now = time.monotonic()
        return self._stop.kill_now or any(since is not None and now - since > limit for since, limit in limits)

    def _with_code_of(self, launcher_code: int) -> tuple[RankEnd, ...]:
        """The first rank's end with its code, which DeepSpeed's launcher, having waited for it, passed on."""
        if len(self._first_ended) != 1 or self._first_ended[0].code is not None or not launcher_code:
            return self._first_ended
        # an exit code has 8 bits: -9, killed by signal 9, arrives as 247
        code = launcher_code - 256 if launcher_code > 191 else launcher_code
        return (RankEnd(self._first_ended[0].rank, code),)
