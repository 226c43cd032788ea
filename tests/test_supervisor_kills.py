"""Ranks killed at random moments over one run, which is started again each time: its record is that of a quiet run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import LaunchDeepspeed
from run_folders import GOLDEN_RECIPE, metrics, sets, status, train, untimed
from supervised import Running, Start, mentioning, start  # noqa: F401 (a fixture)

from moepp_ds.supervisor.restarts import steps_done

pytestmark = [pytest.mark.dist]

EVERY, EVALUATE = 3, 4
MOMENTS = ("step", "save", "evaluation")


def rank_pid(run: Running, rank: int) -> int | None:
    """The process of a rank, once it has started."""
    for pid in mentioning(str(run.run_dir)):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        if f"--local_rank={rank}".encode() in words and b"deepspeed.launcher.launch" not in words:
            return pid
    return None


def wait_for(run: Running, moment: str, *, after: int) -> None:
    """Wait until this start has saved once, and then for a step, the midst of a save, or an evaluation."""
    checkpoints = run.run_dir / "checkpoints"
    run.until(lambda: steps_done(run.run_dir) > after, 300)
    if moment == "save":
        run.until(lambda: any(checkpoints.glob(".step-*.partial")) or run.process.poll() is not None, 120)
    if moment == "evaluation":  # it comes between the update and its line
        run.until(lambda: metrics(run.run_dir)[-1]["step"] % EVALUATE == EVALUATE - 1 or run.process.poll() is not None)


def killed_and_quiet(
    launch: LaunchDeepspeed, start: Start, folder: Path, *, kills: int, background: bool, seed: int  # noqa: F811
) -> None:
    """Compare a run whose ranks are killed so many times with one that is left alone."""
    steps = 5 * kills + 5
    settings = [f"train.max_steps={steps}", f"checkpoint.every={EVERY}", f"evaluation.every={EVALUATE}"]
    draw = random.Random(seed)
    command = ["bash", "launch/train.sh", "--num_gpus", "2", "--max_restarts", "3", "--exit_grace", "5"]
    command += ["--log_level", "warning", GOLDEN_RECIPE, "--run-dir", str(folder / "run")]
    command += sets("parallel.expert_parallel=2", *settings, f"checkpoint.background={str(background).lower()}")
    run, after = start(command, {"DS_ACCELERATOR": "cpu"}), 0
    for number in range(kills):
        moment, rank, delay = draw.choice(MOMENTS), draw.randrange(2), draw.uniform(0, 0.1)
        wait_for(run, moment, after=after)
        time.sleep(delay)
        pid = rank_pid(run, rank)
        assert pid is not None, f"{number} kills, then the run ended:\n{run.output[-3000:]}"
        os.kill(pid, signal.SIGKILL)
        run.until(lambda: sum(line.startswith("restart ") for line in run.said()) == number + 1, 120)
        after = steps_done(run.run_dir)
    assert run.code(600) == 0, run.output[-3000:]
    assert run.living() == []
    named = [line for line in run.said() if "ended first, killed by signal 9 (SIGKILL)" in line]
    assert len(named) == kills, run.said()
    assert status(run.run_dir)["state"] == "completed"
    last = {record["step"]: record for record in untimed_with_steps(run.run_dir)}
    train(launch, folder / "quiet", *settings)
    assert list(last.values()) == untimed_with_steps(folder / "quiet")
    assert list(last) == list(range(1, steps + 1))


def untimed_with_steps(run: Path) -> list[dict[str, object]]:
    return [{"step": record["step"], **numbers} for record, numbers in zip(metrics(run), untimed(run))]


@pytest.mark.timeout(600)
def test_two_kills(launch_deepspeed: LaunchDeepspeed, start: Start, tmp_path: Path) -> None:  # noqa: F811
    # this seed draws a save and an evaluation
    killed_and_quiet(launch_deepspeed, start, tmp_path, kills=2, background=True, seed=11)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True])
def test_twenty_five_kills(
    launch_deepspeed: LaunchDeepspeed, start: Start, tmp_path: Path, background: bool  # noqa: F811
) -> None:
    killed_and_quiet(launch_deepspeed, start, tmp_path, kills=25, background=background, seed=2)
