"""moepp_ds.supervisor.job and restarts: real processes that are stopped, killed, left alone and started again.

`launched_program.py` stands where the training program stands: real ranks, which save and exit on SIGTERM.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from supervised import Running, Start, start  # noqa: F401 (a fixture)

from data_pipeline.locks import take
from moepp_ds.supervisor.processes import describe_exit, exit_code, has_ended
from moepp_ds.supervisor.restarts import pause_after, steps_done
from moepp_ds.supervisor.verdict import COMPLETED, FAILED, FAILED_FOR_GOOD, STOPPED

# Like deepspeed.launcher.launch: two ranks, RANK and LOCAL_RANK in their environment alone.
TWO_RANKS = """
import os, subprocess, sys, time
environments = [{**os.environ, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
ranks = [subprocess.Popen(sys.argv[1:], env=environment) for environment in environments]
while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
    time.sleep(float(os.environ.get("LOOKS_EVERY", "1")))
sys.exit(next((rank.returncode % 256 for rank in ranks if rank.returncode), 0))
"""
SUPERVISE = """
import signal
import sys
from pathlib import Path
from moepp_ds.supervisor.job import Graces
from moepp_ds.supervisor.restarts import Rules, supervise
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which children inherit
run_dir, stop_grace, exit_grace, max_restarts, resume, *command = sys.argv[1:]
rules = Rules(Path(run_dir), Graces(float(stop_grace), float(exit_grace)), int(max_restarts), resume)
sys.exit(supervise(rules, lambda resume, place: [*command, "--resume", resume]))
"""
KILLED = r"\([12] processes did not end in time and were killed\)"


@pytest.fixture
def supervise(tmp_path: Path, start: Start) -> Start:  # noqa: F811
    """Start a supervisor over any command, else over two ranks of the stand-in program."""
    run_dir = str(tmp_path / "run")
    two_ranks = [sys.executable, "-c", TWO_RANKS, sys.executable, "-m", "tests.launched_program"]
    two_ranks += ["r.yaml", "--run-dir", run_dir]

    def start_supervisor(
        *command: str,
        stop_grace: int = 30,
        exit_grace: int = 30,
        max_restarts: int = 0,
        resume: str = "none",
        **env: str,
    ) -> Running:
        numbers = [str(stop_grace), str(exit_grace), str(max_restarts), resume]
        return start([sys.executable, "-c", SUPERVISE, run_dir, *numbers, *(command or two_ranks)], env)

    return start_supervisor


# ---- one start


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        signal.SIGUSR1,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_every_stop_signal_lets_all_ranks_save(supervise: Start, signum: signal.Signals) -> None:
    run = supervise(max_restarts=5)
    run.until_training()
    run.process.send_signal(signum)
    assert run.code() == STOPPED
    assert (run.run_dir / "saved0").exists() and (run.run_dir / "saved1").exists()
    assert run.living() == []


def test_a_second_interrupt_kills_at_once(supervise: Start) -> None:
    run = supervise(SAVING="1000", max_restarts=5)
    run.until_training()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two signals at once would be one
    run.process.send_signal(signal.SIGINT)
    assert run.code() == STOPPED
    assert "3 processes did not end in time and were killed" in run.output
    assert run.living() == []


def test_ranks_that_do_not_stop_are_killed_after_the_grace(supervise: Start) -> None:
    run = supervise(stop_grace=1, DEAF="1")
    run.until_training()
    run.process.terminate()
    assert run.code() == STOPPED  # what was saved before is there to go on from
    assert "; --resume auto goes on from the newest checkpoint (3 processes did not end in time" in run.output
    assert run.living() == []
    (run.run_dir / "metrics.jsonl").unlink()
    run = supervise(stop_grace=1, DEAF="1", resume="auto")
    run.until_training()
    run.process.terminate()
    assert run.code() == FAILED  # else a job would be requeued for ever
    assert run.said()[-1].endswith("; so did the stop before it, and nothing was saved between: see to that first")


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_the_rank_that_died_is_named_and_those_waiting_for_it_are_killed(
    supervise: Start, signum: signal.Signals
) -> None:
    run = supervise(exit_grace=1)
    run.until_training()
    os.kill(run.rank_pid(1), signum)
    assert run.code() == FAILED
    how = f"killed by signal {int(signum)} ({signum.name})"
    assert re.fullmatch(rf"failed at step \d+: rank 1 ended first, {re.escape(how)} {KILLED}", run.said()[0])
    status = json.loads((run.run_dir / "status.json").read_text())  # rank 0 was killed before it could say so
    assert (status["state"], status["message"]) == ("failed", f"rank 1 ended first, {how}")
    assert run.said()[0] in (run.run_dir / "log.txt").read_text()
    assert run.living() == []


def test_a_rank_that_was_waited_for_too_soon_has_its_end_from_the_launcher(supervise: Start) -> None:
    run = supervise(exit_grace=1, LOOKS_EVERY="0.001")
    run.until_training()
    os.kill(run.rank_pid(0), signal.SIGKILL)
    assert run.code() == FAILED
    assert "rank 0 ended first, killed by signal 9 (SIGKILL)" in run.output


def test_stop_before_the_first_rank_ends_the_launcher(supervise: Start, tmp_path: Path) -> None:
    run = supervise(sys.executable, "-c", f"open(r'{tmp_path}/up', 'w'); import time; time.sleep(1000)")
    run.until((tmp_path / "up").exists)
    run.process.terminate()
    assert run.code() == STOPPED
    assert "stopped before training began" in run.output


def test_a_status_of_an_earlier_run_does_not_count(supervise: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "completed", "step": 7}')
    run = supervise(sys.executable, "-c", "raise SystemExit(3)", max_restarts=5)
    assert run.code() == FAILED
    assert run.said() == ["failed: the launcher ended with code 3, no rank was started"]


def test_ranks_can_see_that_their_supervisor_is_gone(supervise: Start) -> None:
    run = supervise()
    run.until_training()
    run.process.kill()
    run.process.wait()
    run.until(lambda: not run.living())
    assert run.state() == "stopped"


def test_a_zombie_tells_how_it_ended() -> None:
    children = [subprocess.Popen(["sh", "-c", f"exit {code}"]) for code in (3, 0)]
    killed = subprocess.Popen(["sleep", "1000"])
    assert not has_ended(killed.pid) and exit_code(killed.pid) is None
    killed.kill()
    for child in (*children, killed):
        while not has_ended(child.pid):
            time.sleep(0.01)
    assert [exit_code(child.pid) for child in (*children, killed)] == [3, 0, -9]
    assert [child.wait() for child in (*children, killed)] == [3, 0, -9]
    assert has_ended(killed.pid) and exit_code(killed.pid) is None
    assert describe_exit(-11) == "killed by signal 11 (SIGSEGV)"
    assert describe_exit(3) == "with exit code 3"
    assert describe_exit(-100) == "killed by signal 100"


def test_the_ranks_save_when_the_launcher_alone_is_stopped(supervise: Start) -> None:
    run = supervise(max_restarts=5)
    run.until_training()
    launcher = int(Path(f"/proc/{run.rank_pid(0)}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGTERM)
    assert run.code() == STOPPED
    assert (run.run_dir / "saved0").exists() and (run.run_dir / "saved1").exists()
    assert run.living() == []


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_a_launcher_that_is_killed_is_no_request_to_stop(supervise: Start, max_restarts: int) -> None:
    """The ranks save; as nobody asked the run to end, it is started again where that is wanted."""
    run = supervise(max_restarts=max_restarts, SAVE_EVERY="10", STEPS="200")
    run.until_training()
    launcher = int(Path(f"/proc/{run.rank_pid(0)}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGKILL)
    assert run.code() == (COMPLETED if max_restarts else STOPPED)
    assert (run.run_dir / "saved0").exists() and (run.run_dir / "saved1").exists()
    said = [re.sub(r"at step \d+", "at step N", line) for line in run.said()]
    again = ["restart 1 of at most 1 without progress, in 1 s", "completed at step N"] if max_restarts else []
    assert said == ["stopped at step N: the deepspeed launcher was killed; continue with --resume auto", *again]
    assert run.living() == []


# ---- start after start


def test_a_run_is_started_again_where_its_checkpoint_is(supervise: Start) -> None:
    run = supervise(max_restarts=1, exit_grace=1, SAVE_EVERY="10", STEPS="200")
    for kill, rank in enumerate((0, 1, 0), start=1):
        done = steps_done(run.run_dir)
        run.until(lambda: steps_done(run.run_dir) >= done + 10)
        run.until((run.run_dir / f"rank{rank}.pid").exists)
        os.kill(run.rank_pid(rank), signal.SIGKILL)
        run.until(lambda: len(run.said()) == 2 * kill)
        (run.run_dir / "rank0.pid").unlink()
        (run.run_dir / "rank1.pid").unlink()
    assert run.code() == COMPLETED
    said = run.said()
    named = [re.search(r": (rank \d) ended first, killed by signal 9 \(SIGKILL\)", line) for line in said[:6:2]]
    assert [found and found[1] for found in named] == ["rank 0", "rank 1", "rank 0"]
    assert said[1::2] == ["restart 1 of at most 1 without progress, in 1 s"] * 3
    assert said[-1] == "completed at step 200"
    assert (run.run_dir / "resumed").read_text().split() == ["none", "auto", "auto", "auto"]
    assert run.living() == []


def test_failures_without_progress_are_bounded_and_the_pauses_grow(supervise: Start) -> None:
    run = supervise(max_restarts=2, exit_grace=0, FAIL_AT="20")
    assert run.code() == FAILED
    failed = "failed at step 20: as it was told; rank 0 ended first, with exit code 1"
    assert [re.sub(rf" {KILLED}$", "", line) for line in run.said()] == [
        failed,
        "restart 1 of at most 2 without progress, in 1 s",
        failed,
        "restart 2 of at most 2 without progress, in 2 s",
        failed,
        "given up: 3 failures in a row without progress (--max_restarts)",
    ]
    assert run.living() == []


def test_what_would_fail_again_is_not_started_again(supervise: Start) -> None:
    run = supervise(max_restarts=5, exit_grace=0, FAIL_AT="5", FAIL_FOR_GOOD="1")
    assert run.code() == FAILED
    assert len(run.said()) == 1


def test_a_stop_ends_the_pause_before_a_restart(supervise: Start) -> None:
    run = supervise(max_restarts=9, exit_grace=0, FAIL_AT="1")
    run.until(lambda: any("in 2 s" in line for line in run.said()))
    run.process.terminate()
    assert run.code() == STOPPED
    assert run.said()[-1] == "stopped while it waited to start; continue with --resume auto"


def test_another_runs_checkpoint_is_resumed_until_this_one_has_its_own(supervise: Start) -> None:
    run = supervise(max_restarts=1, exit_grace=0, resume="elsewhere/step-3", FAIL_AT="5", SAVE_EVERY="100")
    assert run.code() == FAILED
    assert (run.run_dir / "resumed").read_text().split() == ["elsewhere/step-3", "elsewhere/step-3"]
    (run.run_dir / "resumed").unlink()
    run = supervise(max_restarts=1, exit_grace=0, resume="elsewhere/step-3", FAIL_AT="15", SAVE_EVERY="10")
    assert run.code() == FAILED
    assert (run.run_dir / "resumed").read_text().split() == ["elsewhere/step-3", "auto"]


def test_a_run_that_goes_back_makes_progress_from_there(supervise: Start, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000100\n")
    kept = {"SAVE_EVERY": "10", "FAIL_AT": "10 20 30", "STEPS": "40"}  # each failure comes right after a save
    run = supervise(max_restarts=1, exit_grace=0, resume="earlier/step-0", **kept)
    assert run.code() == COMPLETED, run.output
    assert (run.run_dir / "resumed").read_text().split() == ["earlier/step-0", "auto", "auto", "auto"]


def test_a_run_that_none_refuses_to_touch_is_not_gone_on_with(supervise: Start, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000007\n")
    run = supervise(max_restarts=1, exit_grace=0, FAIL_AT="1")
    assert run.code() == FAILED
    assert (run.run_dir / "resumed").read_text().split() == ["none", "none"]


def test_ranks_that_outlived_their_supervisor_are_waited_for(supervise: Start, tmp_path: Path) -> None:
    """They save before they end; what they save is what the next start goes on from."""
    (tmp_path / "run").mkdir()
    with take(tmp_path / "run" / ".lock"):
        run = supervise(STEPS="5")
        run.until(lambda: bool(run.said()))
        by = f"process {os.getpid()} on {socket.gethostname()}"
        assert run.said() == [f"waiting up to 30 s for {by}, which still trains here"]
        time.sleep(1)
        assert not (run.run_dir / "resumed").exists()
    assert run.code() == COMPLETED, run.output


def test_ranks_of_a_killed_supervisor_are_waited_for(supervise: Start) -> None:
    """Also those that hold no lock, as all but rank 0."""
    first = supervise(SAVING="3")
    first.until_training()
    first.process.kill()
    first.process.wait()
    run = supervise(STEPS="5", resume="auto")
    run.until(lambda: bool(run.said()))
    who = r"process \d+(, \d+)* of an earlier supervisor"
    assert re.fullmatch(rf"waiting up to 30 s for {who}, which still trains here", run.said()[0])
    assert not (run.run_dir / "saved0").exists()
    run.until((run.run_dir / "saved1").exists)
    assert (run.run_dir / "resumed").read_text().split() == ["none"]
    assert run.code() == COMPLETED, run.output


def test_a_launcher_that_cannot_be_started_is_tried_again(supervise: Start) -> None:
    run = supervise("/no/such/launcher", max_restarts=1)
    assert run.code() == FAILED
    said = "failed: [Errno 2] No such file or directory: '/no/such/launcher', so no rank was started"
    assert [line for line in run.said() if line.startswith("failed")] == [said, said]


def test_a_stop_ends_the_waiting_for_them(supervise: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with take(tmp_path / "run" / ".lock"):
        run = supervise()
        run.until(lambda: bool(run.said()))
        run.process.terminate()
        assert run.code() == STOPPED
    assert run.said()[-1] == "stopped while it waited to start; continue with --resume auto"


@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_run_does_not_depend_on_who_reads_its_lines(tmp_path: Path, where: str) -> None:
    """On a full disk, and where `| tee` is gone."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = [sys.executable, "-c", TWO_RANKS, sys.executable, "-m", "tests.launched_program"]
    command = [sys.executable, "-c", SUPERVISE, str(run_dir), "30", "30", "1", "none", *command]
    environment = {**os.environ, "STEPS": "20", "FAIL_AT": "10", "SAVE_EVERY": "5"}
    with open("/dev/full", "wb") as full:
        read, write = os.pipe()
        os.close(read)
        out = full if where == "full" else write
        done = subprocess.run([*command, "r.yaml", "--run-dir", str(run_dir)], cwd=ROOT, env=environment, stdout=out)
        os.close(write)
    assert done.returncode == COMPLETED
    assert "[train] completed at step 20" in (run_dir / "log.txt").read_text()


# The supervisor of host a.
OF_TWO_HOSTS = """
import sys
from pathlib import Path
from moepp_ds.supervisor.job import Graces
from moepp_ds.supervisor.restarts import Rules, supervise
from moepp_ds.supervisor.roll import Roll, RollRules
run_dir, hostfile = map(Path, sys.argv[1:])
roll = Roll(run_dir, RollRules(hostfile, "a", None, wait=0.3, silence=1.0, fits=lambda world: None))
sys.exit(supervise(Rules(run_dir, Graces(1.0, 1.0), 5, "auto"), lambda resume, place: ["true"], roll))
"""


def test_a_file_system_that_fails_at_a_start_is_tried_again(start: Start, tmp_path: Path) -> None:  # noqa: F811
    folder, hostfile = tmp_path / "run" / ".hosts", tmp_path / "hosts"
    folder.mkdir(parents=True)
    in_the_way = folder / "attempt-0001"
    in_the_way.touch()  # the attempt's folder cannot be made, as on a full disk
    hostfile.write_text("a slots=1\n")
    run = start([sys.executable, "-c", OF_TWO_HOSTS, str(tmp_path / "run"), str(hostfile)], {})
    run.until(lambda: len(run.said()) == 2)
    in_the_way.unlink()
    assert run.code() == FAILED  # `true` starts no rank
    said = run.said()
    assert said[0].startswith("not started: [Errno 17] File exists: ")
    assert said[1] == "restart 1 of at most 5 without progress, in 1 s"
    assert said[2] == "attempt 1: host 0 of a; 1 ranks"


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        ("b slots=1\n", "not started: this host, a, is no longer in "),
        ("a slots=1\nb slots=1\n", "not started: waited 0.3 s in vain for b "),
    ],
)
def test_what_keeps_a_host_out_does_not_end_the_attempt_of_the_others(
    start: Start, tmp_path: Path, hosts: str, words: str  # noqa: F811
) -> None:
    folder, hostfile = tmp_path / "run" / ".hosts", tmp_path / "hosts"
    folder.mkdir(parents=True)
    hostfile.write_text(hosts)
    run = start([sys.executable, "-c", OF_TWO_HOSTS, str(tmp_path / "run"), str(hostfile)], {})
    assert run.code() == FAILED
    assert [line.startswith(words) for line in run.said()] == [True], run.output
    assert not list(folder.glob("attempt-*/end-*"))


# The supervisor of one of two hosts, with one rank that ends after some seconds.
ONE_OF_TWO = """
import sys
from pathlib import Path
from moepp_ds.supervisor.job import Graces
from moepp_ds.supervisor.restarts import Rules, supervise
from moepp_ds.supervisor.roll import Roll, RollRules
run_dir, hostfile = map(Path, sys.argv[1:3])
own, seconds, code = sys.argv[3:]
roll = Roll(run_dir, RollRules(hostfile, own, None, wait=30.0, silence=10.0, fits=lambda world: None))
rank = f"LOCAL_RANK=0 RANK=0 sh -c 'sleep {seconds}; exit {code}'; exit $?"
sys.exit(supervise(Rules(run_dir, Graces(5.0, 5.0), 3, "auto"), lambda resume, place: ["sh", "-c", rank], roll))
"""


@pytest.mark.parametrize("seconds", [{"a": "2", "b": "0.5"}, {"a": "0.5", "b": "2"}])
def test_what_would_fail_again_on_one_host_is_not_started_again_on_any(
    start: Start, tmp_path: Path, seconds: dict[str, str]  # noqa: F811
) -> None:
    """Whichever ends first."""
    hostfile, codes = tmp_path / "hosts", {"a": "1", "b": str(FAILED_FOR_GOOD)}
    hostfile.write_text("a slots=1\nb slots=1\n")
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", ONE_OF_TWO, str(tmp_path / "run"), str(hostfile)]
    runs = [start([*command, own, seconds[own], codes[own]], {}) for own in "ab"]
    assert [run.code() for run in runs] == [FAILED, FAILED], runs[0].output
    assert not list((tmp_path / "run" / ".hosts").glob("attempt-0002/hosts")), runs[0].output


def test_pauses_grow_to_a_minute_and_end_there() -> None:
    assert [pause_after(failures) for failures in (1, 2, 3, 6, 7, 5000)] == [1, 2, 4, 32, 60, 60]


def test_progress_is_what_latest_or_the_status_tells(tmp_path: Path) -> None:
    assert steps_done(tmp_path) == 0
    (tmp_path / "status.json").write_text('{"state": "running", "step": 7}')
    assert steps_done(tmp_path) == 7
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000012\n")
    assert steps_done(tmp_path) == 12
    (tmp_path / "checkpoints" / "latest").write_bytes(b"\xff\x00")
    (tmp_path / "status.json").write_text("{")
    assert steps_done(tmp_path) == 0
