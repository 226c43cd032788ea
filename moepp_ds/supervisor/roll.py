"""Who takes part in an attempt of several hosts, agreed through the shared run folder: no network, no clocks compared.

1. Join the newest attempt, or where that one is over, the next. A host is present while its beat is seen to change.
2. When all hosts of the hostfile are present, or after `wait` seconds at least `min_hosts`, the list is written and
   linked to its name: that succeeds for one writer only, and nobody sees half a list. Its first host is the master.
3. While ranks run: beat, look for the end of the attempt on another host, and for hosts that have fallen silent.
4. Write how it ended here. That is what the others' supervisors see, sooner than their ranks' collectives time out.

An attempt that was left without an end (a power cut) is told from one that goes on by its beats. Silence is counted
in own beats, not in seconds: where the file system stalls, a host's own beats stall as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.locks import Taken, take
from moepp_ds.config import RecipeError
from moepp_ds.supervisor.attempt import Attempt, End, attempts_since, newest_attempt
from moepp_ds.supervisor.hosts import Host, free_port, read_hostfile
from moepp_ds.supervisor.job import StopRequest
from moepp_ds.supervisor.verdict import FAILED

SILENT_BEATS = 12
"""Own beats without one of another host until that one counts as gone."""


class RollError(RuntimeError):
    """This host does not take part, or there is nothing to take part in; `code` is the exit code that stands for it."""

    def __init__(self, words: str, code: int = FAILED) -> None:
        super().__init__(words)
        self.code = code


@dataclass(frozen=True)
class Place:
    """This host among those of an attempt."""

    attempt: int
    hostfile: Path
    hosts: tuple[Host, ...]
    node_rank: int
    port: int
    resume: str
    """What --resume says; the same on all hosts."""

    @property
    def world(self) -> int:
        """Ranks of all hosts."""
        return sum(host.slots for host in self.hosts)


@dataclass(frozen=True)
class RollRules:
    """Which hosts may take part, and how long they are waited for."""

    hostfile: Path
    own: str
    min_hosts: int | None
    """Go on with so many when the wait is over; None wants all of them."""
    wait: float
    """Seconds to wait for the hosts of the hostfile."""
    silence: float
    """Seconds without a beat until a host counts as gone."""
    fits: Callable[[int], str | None]
    """Why the run cannot be cut into so many ranks; None if it can."""


class Roll:
    """The attempts of a run, as the supervisor of one host sees and makes them."""

    def __init__(self, run_dir: Path, rules: RollRules) -> None:
        """Take the place of this host's supervisor; RollError if another one has it."""
        self._folder, self._rules = run_dir / ".hosts", rules
        self._attempt: Attempt | None = None
        self._since: int | None = None  # the attempt last taken part in, or the first one joined
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = take(self._folder / f"{rules.own}.lock")
        except Taken as error:
            raise RollError(f"{error.by} looks after this run for host {rules.own} already; stop it") from None
        self._beats = 0
        self._next_beat = self._next_look = 0.0
        self._port, self._resume = 0, "auto"
        self._place: Place | None = None
        self._heard: dict[str, tuple[int, int]] = {}  # host -> its last beat, and ours when it came

    @property
    def own(self) -> str:
        """This host's name in the hostfile."""
        return self._rules.own

    def join(self, stop: StopRequest, resume: str) -> Place | None:
        """Take part in the next attempt, once its hosts are there; None when a stop came first.

        resume: what this host would have the ranks resume. Where another one says `auto` the run goes on, as that one
        has seen it go on: a host that was replaced is given its first command line again.
        Raises RollError (this host is not wanted, or the others are missing), RecipeError (the hostfile is wrong, or
        the run cannot be cut for these hosts), OSError.
        """
        began, self._port, self._resume = time.monotonic(), free_port(), resume
        while not stop.asked:
            final = self.ended_for_good()
            if final is not None:
                raise RollError(f"host {final.host}: {final.words}", final.code)
            number = self._open_attempt(stop)
            if number is None:
                break
            attempt = self._enter(number)
            self._beat(attempt, min(1.0, self._rules.silence / SILENT_BEATS))
            place = self._closed(attempt) or self._close(attempt, time.monotonic() - began)
            if place is not None:
                self._place, self._since = place, place.attempt
                return place
            stop.sleep(0.2)
        return None

    def stay(self) -> None:
        """Beat in the attempt that this host's earlier supervisor took part in, for its ranks, which are still ending.

        The other hosts' ranks may be saving together with them, and would be ended for this one's silence.
        """
        now, newest = time.monotonic(), newest_attempt(self._folder)
        if newest is not None and not newest.ends() and now >= self._next_beat:
            self._next_beat = now + self._rules.silence / SILENT_BEATS
            with suppress(OSError):
                newest.write_beat(self._rules.own, newest.beat(self._rules.own) + 1)

    def trouble(self) -> str | None:
        """What ended the attempt on another host, or which host is gone; None while all goes well. Beats."""
        now, attempt = time.monotonic(), self._attempt
        if attempt is None or self._place is None or now < self._next_look:
            return None
        self._next_look = now + min(1.0, self._rules.silence / SILENT_BEATS)
        with suppress(OSError):  # a file system that fails for a moment must not end a supervisor whose ranks go on
            for end in attempt.ends():
                if end.host != self._rules.own:
                    return f"host {end.host}: {end.words}"
        self._beat(attempt, self._rules.silence / SILENT_BEATS)
        for host in self._place.hosts:
            if host.name != self._rules.own and self._is_silent(attempt, host.name):
                return f"host {host.name} has given no sign of life for {self._rules.silence:g} s"
        return None

    def end(self, code: int, words: str, *, restart: bool) -> None:
        """Say that the attempt is over on this host, and why; the last word counts."""
        if self._attempt is None:
            return
        hosts = self._attempt.listed()
        if hosts is None or self._rules.own in [host.name for host in hosts]:  # else it is the others' attempt
            self._attempt.write_end(End(self._rules.own, code, words, restart))

    def leave(self) -> None:
        """Stay out of the attempt that was joined: what keeps this host out does not end it for the others."""
        self._attempt = None

    def ended_for_good(self) -> End | None:
        """The end on a host after which no other is to start again; None if there is none.

        That host may be an attempt behind, where its ranks took long to end, or ahead, where it was told to stop.
        """
        attempts = attempts_since(self._folder, self._since) if self._since is not None else []
        return next((end for attempt in attempts for end in attempt.ends() if not end.restart), None)

    def _open_attempt(self, stop: StopRequest) -> int | None:
        """The number of the attempt to join; None when a stop came first."""
        newest = newest_attempt(self._folder)
        if newest is None:
            return 1
        if newest.ends():
            return newest.number + 1
        hosts = newest.listed()
        if hosts is None or (self._attempt is not None and newest.number == self._attempt.number):
            return newest.number
        names = [host.name for host in hosts]
        if self._rules.own not in names and not self._abandoned(names, newest, stop):
            if stop.asked:
                return None
            raise RollError(
                f"the run goes on without this host, {self._rules.own}: attempt {newest.number} is that of "
                f"{', '.join(names)}; to take part, stop it on one of them and start all again"
            )
        # The lock says that the supervisor this host had then is gone; or all of them are.
        words = f"left without an end, as {self._rules.own} found when it was started again"
        newest.write_end(End(self._rules.own, FAILED, words, restart=True))
        return newest.number + 1

    def _abandoned(self, names: Iterable[str], attempt: Attempt, stop: StopRequest) -> bool:
        """Whether all hosts of an attempt are silent for as long as that counts; False as soon as one beats."""
        before = {name: attempt.beat(name) for name in names}
        end = time.monotonic() + self._rules.silence
        while time.monotonic() < end:
            if attempt.ends():
                return True
            if any(attempt.beat(name) != count for name, count in before.items()):
                return False
            if stop.sleep(min(0.5, self._rules.silence / SILENT_BEATS)):
                return False
        return True

    def _enter(self, number: int) -> Attempt:
        if self._attempt is None or self._attempt.number != number:
            self._attempt, self._next_beat, self._heard = Attempt(self._folder, number), 0.0, {}
            self._attempt.arrive(self._rules.own, port=self._port, resume=self._resume)
            self._since = number if self._since is None else self._since
        return self._attempt

    def _closed(self, attempt: Attempt) -> Place | None:
        """This host's place in the attempt's list; None while there is no list."""
        hosts = attempt.listed()
        if hosts is None:
            return None
        names = [host.name for host in hosts]
        if self._rules.own not in names:
            raise RollError(
                f"attempt {attempt.number} began without this host, {self._rules.own}: its hosts are {', '.join(names)}"
            )
        arrivals = [arrival for name in names if (arrival := attempt.arrival(name)) is not None]
        if len(arrivals) < len(names):  # a file system on a network may show the list first
            return None
        ports, words = zip(*arrivals)
        return Place(
            attempt.number,
            attempt.list_file,
            tuple(hosts),
            node_rank=names.index(self._rules.own),
            port=ports[0],
            resume="auto" if "auto" in words else words[0],
        )

    def _close(self, attempt: Attempt, waited: float) -> Place | None:
        """Close the list if those are here that must be; None if somebody is still waited for."""
        rules = self._rules
        hosts = read_hostfile(rules.hostfile)
        if rules.own not in [host.name for host in hosts]:
            raise RollError(f"this host, {rules.own}, is no longer in {rules.hostfile}")
        present = [host for host in hosts if host.name == rules.own or self._is_present(attempt, host.name)]
        if len(present) < len(hosts) and waited < rules.wait:
            return None
        minimum = min(len(hosts), rules.min_hosts or len(hosts))
        if len(present) < minimum:
            missing = ", ".join(host.name for host in hosts if host not in present)
            few = f"--min_nodes {minimum}" if rules.min_hosts else "--min_nodes M would go on with fewer"
            raise RollError(f"waited {rules.wait:g} s in vain for {missing} ({few}); start training there, too")
        attempt.close(_most_that_fit(present, minimum, rules.fits), by=rules.own)
        return self._closed(attempt)

    def _beat(self, attempt: Attempt, every: float) -> None:
        """Count on, if the last beat was so long ago."""
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + every
        with suppress(OSError):  # not having beaten, this host has not waited either
            attempt.write_beat(self._rules.own, self._beats + 1)
            self._beats += 1

    def _listen(self, attempt: Attempt, name: str) -> int:
        """Own beats since another host's last one was new; -1 while it was heard once and may be old."""
        count = attempt.beat(name)
        if name not in self._heard:
            self._heard[name] = (count, -1)
        elif self._heard[name][0] != count:
            self._heard[name] = (count, self._beats)
        since = self._heard[name][1]
        return -1 if since < 0 else self._beats - since

    def _is_present(self, attempt: Attempt, name: str) -> bool:
        return 0 <= self._listen(attempt, name) < SILENT_BEATS

    def _is_silent(self, attempt: Attempt, name: str) -> bool:
        if self._listen(attempt, name) < 0:  # it made the list, so it was there: count from now
            self._heard[name] = (self._heard[name][0], self._beats)
        return self._listen(attempt, name) >= SILENT_BEATS


def _most_that_fit(present: Sequence[Host], minimum: int, fits: Callable[[int], str | None]) -> list[Host]:
    """The first hosts of those present, as many as the run can be cut for; RecipeError says why it cannot."""
    for count in range(len(present), minimum - 1, -1):
        hosts = list(present[:count])
        if fits(sum(host.slots for host in hosts)) is None:
            return hosts
    world = sum(host.slots for host in present)
    names = ", ".join(f"{host.name} with {host.slots}" for host in present)
    raise RecipeError(f"the run does not fit the hosts that are here ({names}: {world} ranks): {fits(world)}")
