"""moepp_ds.supervisor.roll: several hosts, here threads of one process, agree on who takes part."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moepp_ds.config import RecipeError
from moepp_ds.supervisor.hosts import Host
from moepp_ds.supervisor.job import StopRequest
from moepp_ds.supervisor.roll import Place, Roll, RollError, RollRules
from moepp_ds.supervisor.verdict import COMPLETED, FAILED, STOPPED

SILENCE = 1.2  # seconds: a beat is a twelfth of it


def at_most(world: int) -> Callable[[int], str | None]:
    """A run that can be cut for so many ranks and no more."""
    return lambda asked: None if asked <= world else f"{asked} ranks are more than {world}"


class Cluster:
    """A hostfile of hosts a, b, c with two slots each, and a roll for each of them."""

    def __init__(self, folder: Path, names: str = "abc") -> None:
        self.run_dir, self.hostfile = folder / "run", folder / "hosts"
        self.write_hosts(names)
        self.stop = StopRequest()

    def write_hosts(self, names: str) -> None:
        self.hostfile.write_text("".join(f"{name} slots=2\n" for name in names))

    def roll(self, own: str, *, min_hosts: int | None = None, wait: float = 30.0, world: int = 99) -> Roll:
        rules = RollRules(self.hostfile, own, min_hosts, wait=wait, silence=SILENCE, fits=at_most(world))
        return Roll(self.run_dir, rules)

    def join(self, *rolls: Roll, resume: str = "auto auto auto") -> list[Place | Exception | None]:
        """What each of them gets, all of them joining at once; resume: the words of each."""
        results: list[Place | Exception | None] = [None] * len(rolls)

        def one(at: int) -> None:
            try:
                results[at] = rolls[at].join(self.stop, resume.split()[at])
            except (RollError, RecipeError) as error:
                results[at] = error

        threads = [threading.Thread(target=one, args=(at,)) for at in range(len(rolls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def joined(results: list[Place | Exception | None]) -> list[Place]:
    assert all(isinstance(place, Place) for place in results), results
    return [place for place in results if isinstance(place, Place)]


def beat_until(rolls: dict[str, Roll], seconds: float = 10.0) -> dict[str, str]:
    """Let hosts beat until one of them sees trouble."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seen = {name: trouble for name, roll in rolls.items() if (trouble := roll.trouble()) is not None}
        if seen:
            return seen
        time.sleep(0.05)
    return {}


def test_all_hosts_get_the_same_list_and_one_port(cluster: Cluster) -> None:
    places = joined(cluster.join(*(cluster.roll(name) for name in "cab")))
    assert [place.node_rank for place in places] == [2, 0, 1]
    assert {place.hosts for place in places} == {(Host("a", 2), Host("b", 2), Host("c", 2))}
    assert {place.attempt for place in places} == {1} and len({place.port for place in places}) == 1
    assert {place.world for place in places} == {6}
    assert places[0].hostfile.read_text() == "a slots=2\nb slots=2\nc slots=2\n"


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("none none none", "none"),
        ("runs/x/step-3 runs/x/step-3 runs/x/step-3", "runs/x/step-3"),
        ("runs/x/step-3 auto auto", "auto"),  # the first one was replaced: the others have seen the run go on
        ("none auto auto", "auto"),
    ],
)
def test_a_host_that_was_replaced_does_not_take_the_run_back(cluster: Cluster, said: str, word: str) -> None:
    places = joined(cluster.join(*(cluster.roll(name) for name in "abc"), resume=said))
    assert {place.resume for place in places} == {word}


def test_a_missing_host_is_waited_for_and_named(cluster: Cluster) -> None:
    (error,) = cluster.join(cluster.roll("a", wait=0.5))
    assert isinstance(error, RollError) and error.code == FAILED
    assert str(error) == (
        "waited 0.5 s in vain for b, c (--min_nodes M would go on with fewer); start training there, too"
    )


def test_with_fewer_hosts_when_told_to(cluster: Cluster) -> None:
    rolls = [cluster.roll(name, min_hosts=2, wait=1.5) for name in "bc"]
    places = joined(cluster.join(*rolls))
    assert [place.node_rank for place in places] == [0, 1]
    assert places[0].hosts == (Host("b", 2), Host("c", 2))
    late = cluster.roll("a")
    beats = threading.Thread(target=beat_until, args=({"b": rolls[0], "c": rolls[1]}, 2.0))
    beats.start()
    (error,) = cluster.join(late)
    beats.join()
    assert str(error).startswith("the run goes on without this host, a: attempt 1 is that of b, c; to take part, stop")
    late.end(FAILED, "not started", restart=False)  # which harms nobody
    assert rolls[0].ended_for_good() is None


def test_as_many_hosts_as_the_batch_divides_among(cluster: Cluster) -> None:
    results = cluster.join(*(cluster.roll(name, min_hosts=1, world=4) for name in "abc"))
    places = joined(results[:2])
    assert places[0].hosts == (Host("a", 2), Host("b", 2))
    assert str(results[2]) == "attempt 1 began without this host, c: its hosts are a, b"


def test_hosts_among_which_the_batch_does_not_divide_are_refused(cluster: Cluster) -> None:
    results = cluster.join(*(cluster.roll(name, world=5) for name in "abc"))
    assert {str(error) for error in results if isinstance(error, RecipeError)} == {
        "the run does not fit the hosts that are here (a with 2, b with 2, c with 2: 6 ranks): 6 ranks are more than 5"
    }


def test_the_end_on_one_host_is_seen_by_the_others_and_the_next_attempt_has_a_number(cluster: Cluster) -> None:
    rolls = {name: cluster.roll(name) for name in "abc"}
    joined(cluster.join(*rolls.values()))
    rolls["b"].end(FAILED, "rank 3 ended first", restart=True)
    assert beat_until({"a": rolls["a"]}) == {"a": "host b: rank 3 ended first"}
    cluster.write_hosts("cab")  # an operator's edit
    places = joined(cluster.join(*rolls.values()))
    assert {place.attempt for place in places} == {2}
    assert [place.node_rank for place in places] == [1, 2, 0]


def test_a_host_taken_out_of_the_hostfile_is_told(cluster: Cluster) -> None:
    rolls = {name: cluster.roll(name) for name in "abc"}
    joined(cluster.join(*rolls.values()))
    for roll in rolls.values():
        roll.end(FAILED, "all failed", restart=True)
    cluster.write_hosts("ab")
    results = cluster.join(*rolls.values())
    assert re.match("this host, c, is no longer in|attempt 2 began without this host, c", str(results[2]))
    assert joined(results[:2])[0].hosts == (Host("a", 2), Host("b", 2))


@pytest.mark.parametrize("code", [COMPLETED, STOPPED, FAILED])
def test_no_host_starts_again_when_one_has_ended_for_good(cluster: Cluster, code: int) -> None:
    rolls = {name: cluster.roll(name) for name in "abc"}
    joined(cluster.join(*rolls.values()))
    rolls["a"].end(code, "it is over", restart=False)
    final = rolls["b"].ended_for_good()
    assert final is not None and (final.host, final.code) == ("a", code)
    (error,) = cluster.join(rolls["b"])
    assert isinstance(error, RollError) and (str(error), error.code) == ("host a: it is over", code)


def test_a_host_that_goes_on_too_early_sees_the_end_of_the_attempt_before(cluster: Cluster) -> None:
    rolls = {name: cluster.roll(name) for name in "abc"}
    joined(cluster.join(*rolls.values()))
    rolls["b"].end(FAILED, "its ranks died", restart=True)
    late = threading.Timer(0.6, lambda: rolls["a"].end(COMPLETED, "completed at step 9", restart=False))
    late.start()
    (error,) = cluster.join(rolls["b"])  # it waits in attempt 2 by then
    late.join()
    assert (cluster.run_dir / ".hosts" / "attempt-0002" / "beat-b").exists()
    assert isinstance(error, RollError) and (str(error), error.code) == ("host a: completed at step 9", COMPLETED)


def test_a_stop_told_to_a_host_that_waits_already_reaches_those_that_come_later(cluster: Cluster) -> None:
    rolls = {name: cluster.roll(name) for name in "ab"}
    cluster.write_hosts("ab")
    joined(cluster.join(*rolls.values()))
    for roll in rolls.values():
        roll.end(FAILED, "its ranks died", restart=True)
    early = threading.Timer(0.6, lambda: setattr(cluster.stop, "asked_at", time.monotonic()))
    early.start()
    assert cluster.join(rolls["a"]) == [None]
    rolls["a"].end(STOPPED, "stopped", restart=False)
    cluster.stop.asked_at = None
    (error,) = cluster.join(rolls["b"])
    assert isinstance(error, RollError) and (str(error), error.code) == ("host a: stopped", STOPPED)


def test_a_host_that_falls_silent_is_named(cluster: Cluster) -> None:
    rolls = {name: cluster.roll(name) for name in "abc"}
    joined(cluster.join(*rolls.values()))
    del rolls["b"]  # killed: it leaves no end, and no beat from now on
    seen = beat_until(rolls)
    assert set(seen.values()) == {"host b has given no sign of life for 1.2 s"}


def test_after_a_power_cut_all_start_again(cluster: Cluster) -> None:
    for name in "abc":  # the supervisors of the first start are gone, and their locks with them
        rolls = {name: cluster.roll(name) for name in "abc"}
        joined(cluster.join(*rolls.values()))
        rolls.clear()
        break
    places = joined(cluster.join(*(cluster.roll(name) for name in "abc")))
    assert {place.attempt for place in places} == {2}


def test_other_hosts_find_an_attempt_abandoned_by_its_silence(cluster: Cluster) -> None:
    joined(cluster.join(*(cluster.roll(name) for name in "abc")))
    cluster.write_hosts("de")
    places = joined(cluster.join(cluster.roll("d"), cluster.roll("e")))
    assert {place.attempt for place in places} == {2}


def test_beats_of_a_dead_supervisor_do_not_make_its_host_present(cluster: Cluster) -> None:
    cluster.join(cluster.roll("a", wait=0.3))  # gave up, and has not said so: as if it had been killed
    (error,) = cluster.join(cluster.roll("b", wait=0.5))
    assert str(error).startswith("waited 0.5 s in vain for a, c")


def test_one_supervisor_a_host(cluster: Cluster) -> None:
    first = cluster.roll("a")
    with pytest.raises(RollError, match=r"process \d+ on .* looks after this run for host a already; stop it"):
        cluster.roll("a")
    del first
    cluster.roll("a")


def test_a_stop_ends_the_waiting(cluster: Cluster) -> None:
    cluster.stop.asked_at = time.monotonic()
    assert cluster.join(cluster.roll("a")) == [None]


def test_what_is_no_attempt_is_ignored(cluster: Cluster) -> None:
    for stray in ("attempt-0007.bak", "attempt-", "attempt-x"):
        (cluster.run_dir / ".hosts" / stray).mkdir(parents=True)
    (place,) = joined(cluster.join(cluster.roll("a", min_hosts=1, wait=0.0)))
    assert place.attempt == 1
