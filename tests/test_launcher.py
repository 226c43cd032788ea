"""moepp_ds.launcher: command line, verdicts, and real processes that are stopped, killed and left alone.

`launched_program.py` stands where the training program stands: real ranks, which save and exit on SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moepp_ds.config import RecipeError
from moepp_ds.launcher import COMPLETED, FAILED, STOPPED, Ending, judge, main, parse_launch

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
deepspeed: {deepspeed}
model:
  moe: {{num_ffn_experts: 2}}
  vocab_size: 64
  num_layers: 1
  hidden_size: 8
  num_heads: 2
  ffn_hidden_size: 8
data: {{path: nowhere}}
train: {{max_steps: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid recipe called tiny."""
    (tmp_path / "ds.json").write_text("{}")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(deepspeed=tmp_path / "ds.json"))
    return path


# ---- command line


def test_command_is_the_launcher_with_its_options_then_the_program(recipe: Path) -> None:
    launch = parse_launch(["--num_gpus", "2", "--master_port", "7", str(recipe), "--resume", "auto"])
    assert launch.command[1:] == (
        *("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "7"),
        *("--module", "moepp_ds.train", str(recipe), "--resume", "auto", "--run-dir", "runs/tiny"),
    )
    assert (launch.run_dir, launch.stop_grace, launch.exit_grace) == (Path("runs/tiny"), 600.0, 60.0)


@pytest.mark.parametrize(
    ("arguments", "run_dir"),
    [
        (["--set", "name=other"], "runs/other"),
        (["--run-dir", "somewhere/else"], "somewhere/else"),
        (["--run-dir=somewhere/else", "--set", "name=other"], "somewhere/else"),
    ],
)
def test_run_dir_follows_the_name_unless_given(recipe: Path, arguments: list[str], run_dir: str) -> None:
    launch = parse_launch([str(recipe), *arguments])
    assert launch.run_dir == Path(run_dir)
    assert sum(argument.startswith("--run-dir") for argument in launch.command) == 1


def test_own_options_stay_here_and_a_free_port_is_chosen(recipe: Path) -> None:
    launch = parse_launch(["--stop_grace", "5", "--exit_grace", "2", "--program", "a.b", str(recipe)])
    assert (launch.stop_grace, launch.exit_grace) == (5.0, 2.0)
    assert not any("grace" in argument for argument in launch.command)
    assert launch.command[launch.command.index("--module") + 1] == "a.b"
    assert 1024 <= int(launch.command[launch.command.index("--master_port") + 1]) < 65536


def test_several_nodes_keep_the_launchers_port(recipe: Path) -> None:
    launch = parse_launch(["--hostfile", "hosts", "--no_ssh", "--node_rank", "1", str(recipe)])
    assert "--master_port" not in launch.command


def test_missing_recipe_is_named() -> None:
    with pytest.raises(RecipeError, match=r"no recipe among the arguments '--num_gpus 2': one must"):
        parse_launch(["--num_gpus", "2"])


def test_a_mistake_in_the_recipe_starts_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--set", "train.max_stepz=3"]) == FAILED
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: " in shown.err and "did you mean train.max_steps?" in shown.err


# ---- verdicts


def ending(**changes: object) -> Ending:
    usual: dict[str, object] = {"launcher_code": 0, "ranks_started": 2, "first_ended": ()}
    return Ending(**{**usual, "stop_asked": False, "killed": 0, **changes})  # type: ignore[arg-type]


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
        (ending(), {"state": "failed", "step": 4, "message": "nan"}, FAILED, "failed at step 4: nan"),
        (
            ending(launcher_code=247, first_ended=(1,)),
            {"state": "running", "step": 4},
            FAILED,
            "failed: ended at step 4 in state 'running'; rank 1 ended first",
        ),
        (
            ending(stop_asked=True, killed=3),
            {"state": "running", "step": 4},
            FAILED,
            "failed: ended at step 4 in state 'running' (3 processes did not end in time and were killed)",
        ),
        (
            ending(launcher_code=1),
            None,
            FAILED,
            "failed before training began, with code 1; the reason is above",
        ),
        (
            ending(launcher_code=2, ranks_started=0),
            None,
            FAILED,
            "failed: the launcher ended with code 2, no rank was started",
        ),
        (
            ending(stop_asked=True),
            None,
            STOPPED,
            "stopped before training began; start it again with --resume auto",
        ),
    ],
)
def test_verdict(seen: Ending, status: dict[str, object] | None, code: int, says: str) -> None:
    assert judge(seen, status) == (code, says)


# ---- processes


class Running:
    """A supervisor under test, its run folder, its output, and every process that mentions that folder."""

    def __init__(self, command: list[str], run_dir: Path, env: dict[str, str]) -> None:
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def living(self) -> list[int]:
        """Ids of processes, the supervisor aside, that have the run folder in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and str(self.run_dir).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass  # ended meanwhile
        return [pid for pid in found if pid not in (os.getpid(), self.process.pid)]

    def until(self, reached: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until something is so; fail with the output when it does not come to be."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"waited {seconds} s in vain; output:\n{self.output}"
            time.sleep(0.05)

    def until_training(self) -> None:
        """Wait until both ranks have started and rank 0 has made ten steps."""
        metrics = self.run_dir / "metrics.jsonl"
        self.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 10)
        self.until((self.run_dir / "rank1.pid").exists)

    def rank_pid(self, rank: int) -> int:
        return int((self.run_dir / f"rank{rank}.pid").read_text())

    def state(self) -> str:
        return str(json.loads((self.run_dir / "status.json").read_text())["state"])

    def code(self) -> int:
        return self.process.wait(timeout=60)


Start = Callable[..., Running]

# Like deepspeed.launcher.launch: two ranks, RANK and LOCAL_RANK in their environment alone.
TWO_RANKS = """
import os, subprocess, sys
environments = [{**os.environ, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
ranks = [subprocess.Popen(sys.argv[1:], env=environment) for environment in environments]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""
SUPERVISE = """
import signal
import sys
from pathlib import Path
from moepp_ds.launcher import Launch, supervise
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which children inherit
run_dir, stop_grace, exit_grace, *command = sys.argv[1:]
sys.exit(supervise(Launch(tuple(command), Path(run_dir), float(stop_grace), float(exit_grace))))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command whose run folder is tmp_path/run; kill it and all it left when the test ends."""
    started: list[Running] = []

    def start_one(command: list[str], env: dict[str, str]) -> Running:
        started.append(Running(command, tmp_path / "run", env))
        return started[-1]

    yield start_one
    for running in started:
        running.process.kill()
        for pid in running.living():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def supervise(tmp_path: Path, start: Start) -> Start:
    """Start a supervisor over any command, else over two ranks of the stand-in program."""
    run_dir = str(tmp_path / "run")
    two_ranks = [sys.executable, "-c", TWO_RANKS, sys.executable, "-m", "tests.launched_program"]
    two_ranks += ["r.yaml", "--run-dir", run_dir]

    def start_supervisor(*command: str, stop_grace: int = 30, exit_grace: int = 30, **env: str) -> Running:
        graces = [str(stop_grace), str(exit_grace)]
        return start([sys.executable, "-c", SUPERVISE, run_dir, *graces, *(command or two_ranks)], env)

    return start_supervisor


@pytest.fixture
def train_sh(tmp_path: Path, recipe: Path, start: Start) -> Start:
    """Start launch/train.sh with the real deepspeed launcher over two ranks of the stand-in program."""

    def start_training(*options: str, **env: str) -> Running:
        command = ["bash", "launch/train.sh", "--num_gpus", "2", "--program", "tests.launched_program"]
        command += [*options, str(recipe), "--run-dir", str(tmp_path / "run")]
        return start(command, {"DS_ACCELERATOR": "cpu", **env})

    return start_training


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_every_stop_signal_lets_all_ranks_save(supervise: Start, signum: signal.Signals) -> None:
    run = supervise()
    run.until_training()
    run.process.send_signal(signum)
    assert run.code() == STOPPED
    assert (run.run_dir / "saved0").exists() and (run.run_dir / "saved1").exists()
    assert run.living() == []


def test_a_second_interrupt_kills_at_once(supervise: Start) -> None:
    run = supervise(SAVING="1000")
    run.until_training()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two signals at once would be one
    run.process.send_signal(signal.SIGINT)
    assert run.code() == FAILED
    assert "3 processes did not end in time and were killed" in run.output
    assert run.living() == []


def test_ranks_that_do_not_stop_are_killed_after_the_grace(supervise: Start) -> None:
    run = supervise(stop_grace=1, DEAF="1")
    run.until_training()
    run.process.terminate()
    assert run.code() == FAILED
    assert "in state 'running' (3 processes did not end in time and were killed)" in run.output
    assert run.living() == []


def test_ranks_left_waiting_for_a_dead_one_are_killed(supervise: Start) -> None:
    run = supervise(exit_grace=1)
    run.until_training()
    os.kill(run.rank_pid(1), signal.SIGKILL)
    assert run.code() == FAILED
    assert "in state 'running'; rank 1 ended first (2 processes did not end in time" in run.output
    assert run.living() == []


def test_stop_before_the_first_rank_ends_the_launcher(supervise: Start, tmp_path: Path) -> None:
    run = supervise(sys.executable, "-c", f"open(r'{tmp_path}/up', 'w'); import time; time.sleep(1000)")
    run.until((tmp_path / "up").exists)
    run.process.terminate()
    assert run.code() == STOPPED
    assert "stopped before training began" in run.output


def test_a_status_of_an_earlier_run_does_not_count(supervise: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "completed", "step": 7}')
    run = supervise(sys.executable, "-c", "raise SystemExit(3)")
    assert run.code() == FAILED
    assert "the launcher ended with code 3, no rank was started" in run.output


def test_ranks_can_see_that_their_supervisor_is_gone(supervise: Start) -> None:
    run = supervise()
    run.until_training()
    run.process.kill()
    run.process.wait()
    run.until(lambda: not run.living())
    assert run.state() == "stopped"


@pytest.mark.dist
def test_train_sh_completes(train_sh: Start) -> None:
    run = train_sh(STEPS="5")
    assert run.code() == COMPLETED
    assert run.output.endswith(f"[train] {run.run_dir}: completed at step 5\n")


@pytest.mark.dist
def test_train_sh_stops_cleanly_under_the_real_launcher(train_sh: Start) -> None:
    run = train_sh(SAVING="3")
    run.until_training()
    run.process.terminate()
    assert run.code() == STOPPED
    assert run.state() == "stopped"
    assert (run.run_dir / "saved0").exists() and (run.run_dir / "saved1").exists()
    assert "continue with --resume auto" in run.output.splitlines()[-1]
    assert run.living() == []


@pytest.mark.dist
def test_train_sh_reports_a_killed_rank(train_sh: Start) -> None:
    run = train_sh("--exit_grace", "3", DEAF="1")
    run.until_training()
    os.kill(run.rank_pid(1), signal.SIGKILL)
    assert run.code() == FAILED
    assert "in state 'running'; rank 1 ended first" in run.output.splitlines()[-1]
    assert run.living() == []
