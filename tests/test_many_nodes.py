"""Training across hosts with networks of their own: a supervisor on each, links that are cut, hosts that die.

The hosts are network namespaces (see network_hosts.py) that share this machine's file system, as the nodes of a cluster
share one. Everything from `launch/train.sh` down to the `deepspeed` launcher and its ranks is what runs on a cluster.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import LaunchDeepspeed
from network_hosts import NAMES, Room, room, why_not
from run_folders import GOLDEN_RECIPE, TOLERANCES, finished, metrics, sets, status, untimed
from supervised import lines_of_supervisor, mentioning

NO_ROOM = why_not()
pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(600),
    pytest.mark.skipif(NO_ROOM is not None, reason=f"NOT RUN: no network namespaces here ({NO_ROOM})"),
]


class Training:
    """A run of the golden recipe on the hosts of a room, one supervisor on each."""

    def __init__(self, on: Room, folder: Path, *, slots: int, by_address: bool = False) -> None:
        self.room, self.folder, self.run_dir = on, folder, folder / "run"
        self.hostfile = folder / "hostfile"
        self.list_hosts(on.names, slots=slots, by_address=by_address)
        self.supervisors: dict[str, subprocess.Popen[bytes]] = {}

    def list_hosts(self, names: tuple[str, ...], *, slots: int, by_address: bool = False) -> None:
        called = [self.room.address(name) if by_address else name for name in names]
        self.hostfile.write_text("".join(f"{name} slots={slots}\n" for name in called))

    def start(self, *settings: str, options: tuple[str, ...] = (), ep: int = 2, env: Mapping[str, str] = {}) -> None:
        """Start training on every host of the hostfile."""
        command = ["bash", "launch/train.sh", "--hostfile", str(self.hostfile), "--no_ssh", "--node_rank", "auto"]
        command += ["--exit_grace", "3", "--log_level", "warning", *options, GOLDEN_RECIPE, "--resume", "auto"]
        command += ["--run-dir", str(self.run_dir), *sets(f"parallel.expert_parallel={ep}", *settings)]
        listed = self.hostfile.read_text()
        for name in self.room.names:
            if f"{name} " in listed or f"{self.room.address(name)} " in listed:
                environment = {"DS_ACCELERATOR": "cpu", **env}
                self.supervisors[name] = self.room.start(name, command, self.log(name), environment)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> list[str]:
        """A supervisor's own lines."""
        return lines_of_supervisor(self.log(name).read_text(errors="replace"), self.run_dir)

    def until(self, reached: Callable[[], bool], seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"waited {seconds} s in vain\n{self.tails()}"
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        self.until(lambda: (self.run_dir / "metrics.jsonl").exists() and len(metrics(self.run_dir)) >= step)

    def end(self, name: str, seconds: float = 240.0) -> int:
        """The exit code of a host's supervisor."""
        try:
            return self.supervisors[name].wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} took more than {seconds} s\n{self.tails()}")

    def tails(self) -> str:
        logs = {name: self.log(name).read_text(errors="replace")[-2500:] for name in self.supervisors}
        return "\n".join(f"---- {name}\n{text}" for name, text in logs.items())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs on one host are that several tests compare with."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Room]:
    with room(NAMES[:2], tmp_path) as made:
        yield made
    assert mentioning(str(tmp_path)) == []


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Room]:
    with room(NAMES, tmp_path) as made:
        yield made
    assert mentioning(str(tmp_path)) == []


def close_to(run: Path, other: Path) -> None:
    """The losses and gradient norms of two runs on different layouts."""
    mine, theirs = metrics(run), metrics(other)
    assert len(mine) == len(theirs) == 20
    for got, expected in zip(mine, theirs):
        for key, tolerance in TOLERANCES.items():
            assert got[key] == pytest.approx(expected[key], rel=tolerance), (key, got["step"])


def test_a_link_is_cut_in_the_middle_of_a_step(
    two: Room, launch_deepspeed: LaunchDeepspeed, tmp_path: Path, kept: Path
) -> None:
    """Two hosts with one rank each, so EP 2 crosses the link: both sides end in time; mended, the run goes on exactly.

    The reference is one host with the same two ranks: a network changes no digit.
    """
    alone = finished(launch_deepspeed, kept, "alone")
    training = Training(two, tmp_path, slots=1, by_address=True)
    settings = ("safety.collective_timeout=10", "checkpoint.every=5")
    # hosts that are known by their addresses alone: gloo must be told which interface to use
    training.start(*settings, options=("--max_restarts", "3"), env={"GLOO_SOCKET_IFNAME": "eth0"})
    training.until_step(7)
    two.cut("node-b")
    for name in two.names:
        training.until(lambda: any(line.startswith("failed") for line in training.said(name)), 60)
    two.mend("node-b")
    assert [training.end(name) for name in two.names] == [0, 0], training.tails()
    assert untimed(training.run_dir) == alone
    for name in two.names:
        first, failed, again, second, *_, last = training.said(name)
        assert first == f"attempt 1: host {two.names.index(name)} of 10.77.0.1, 10.77.0.2; 2 ranks"
        assert "ended first" in failed or "host 10.77.0." in failed
        assert again.startswith("restart 1 of at most 3 without progress, in 1 s")
        assert second.startswith("attempt 2: ")
        assert last.startswith("completed at step 20")


def test_a_host_dies_and_the_others_go_on(
    four: Room, launch_deepspeed: LaunchDeepspeed, tmp_path: Path, kept: Path
) -> None:
    """Four hosts with one rank each: one vanishes, cable and all; of the three left, two divide the batch."""
    finished(launch_deepspeed, kept, "alone")
    training = Training(four, tmp_path, slots=1)
    options = ("--max_restarts", "3", "--min_nodes", "2", "--node_wait", "15", "--host_silence", "12")
    training.start("checkpoint.every=5", options=options)
    training.until_step(7)
    four.cut("node-b")
    four.kill("node-b")
    assert [training.end(name) for name in ("node-a", "node-c", "node-d")] == [0, 0, 1], training.tails()
    for name in ("node-a", "node-c"):
        said = training.said(name)
        assert "; 4 ranks" in said[0]
        assert "host node-" in said[1]  # node-b is silent, or another host has noticed before
        assert "of node-a, node-c; 2 ranks" in said[3]
        assert said[-1].startswith("completed at step 20")
    assert "began without this host, node-d: its hosts are node-a, node-c" in training.said("node-d")[-1]
    assert status(training.run_dir)["state"] == "completed"
    close_to(training.run_dir, kept / "alone")


@pytest.mark.slow
def test_experts_inside_hosts_and_a_run_that_goes_on_with_fewer(
    two: Room, launch_deepspeed: LaunchDeepspeed, tmp_path: Path, kept: Path
) -> None:
    """Two hosts with two ranks each, EP 2 inside a host; stopped by one host's signal, resumed on the other alone."""
    finished(launch_deepspeed, kept, "alone")
    training = Training(two, tmp_path, slots=2)
    training.start()
    training.until_step(7)
    # the supervisor is the process in the host that holds the lock; it is told as SLURM or an operator would
    by = re.fullmatch(r"process (\d+) on \S+\n", (training.run_dir / ".hosts" / "node-b.lock").read_text())
    assert by and two.on("node-b", ["kill", "-USR1", by[1]]).returncode == 0
    assert [training.end(name) for name in two.names] == [75, 75], training.tails()
    assert training.said("node-a")[-1].startswith("stopped at step")
    assert status(training.run_dir)["state"] == "stopped"
    training.list_hosts(("node-b",), slots=2)
    training.start()
    assert training.end("node-b") == 0, training.tails()
    close_to(training.run_dir, kept / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("ep", [2, 4])
def test_four_hosts_with_experts_across(
    four: Room, launch_deepspeed: LaunchDeepspeed, tmp_path: Path, ep: int
) -> None:
    """A rank on each of four hosts computes digit for digit what four ranks of one host do, dead hosts or not."""
    alone = finished(launch_deepspeed, tmp_path, f"alone-{ep}", world=4, ep=ep)
    training = Training(four, tmp_path, slots=1)
    training.start("checkpoint.every=5", "safety.collective_timeout=60", ep=ep, options=("--max_restarts", "1"))
    training.until_step(12)
    four.kill("node-c")
    training.until(lambda: any(line.startswith("restart 1") for line in training.said("node-a")))
    four.boot("node-c")
    listed = training.hostfile.read_text()
    training.hostfile.write_text("node-c slots=1\n")
    training.start("checkpoint.every=5", "safety.collective_timeout=60", ep=ep, options=("--max_restarts", "1"))
    training.hostfile.write_text(listed)
    assert [training.end(name) for name in four.names] == [0, 0, 0, 0], training.tails()
    assert untimed(training.run_dir) == alone
