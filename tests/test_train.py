"""The training program under the real launcher: golden losses, exact resume, signals and errors end it cleanly.

The run is the golden one: 20 updates of a small MoE++ model on committed shards, fp32.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed
from conftest import ROOT, LaunchDeepspeed, find_free_port, kill_group
from run_folders import GOLDEN_RECIPE, TOLERANCES, finished, sets, status, train, untimed

from moepp_ds.checkpoint.files import candidates
from moepp_ds.supervisor.verdict import FAILED_FOR_GOOD
from moepp_ds.train import main

STEERED = (
    "checkpoint.every=3",
    "model.moe.controller={rate: 0.5}",
    "model.moe.balance_scope=global_batch",
    "model.moe.router.jitter=0.05",
    "monitor.gradient_ratio_every=4",
)
"""Settings under which an update depends on what routing remembers of the one before it."""

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def kept_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where finished runs lie that several tests compare."""
    return tmp_path_factory.mktemp("runs")


def test_golden_losses(launch_deepspeed: LaunchDeepspeed, kept_runs: Path) -> None:
    """World 2, EP 2 gives the committed losses on any machine, to TOLERANCES, and the same digits twice on this one."""
    run = finished(launch_deepspeed, kept_runs, "false-2-2")
    assert run == finished(launch_deepspeed, kept_runs, "often-saved", "checkpoint.every=3")
    golden = json.loads((ROOT / "tests/golden/losses.json").read_text())
    for key, tolerance in TOLERANCES.items():
        assert [record[key] for record in run] == pytest.approx(golden[key], rel=tolerance)


def test_resume_after_sigkill_is_exact(launch_deepspeed: LaunchDeepspeed, kept_runs: Path, tmp_path: Path) -> None:
    """Killed at a random update and resumed, the run's record is that of one never stopped, digit for digit."""
    whole, cut = finished(launch_deepspeed, kept_runs, "steered", *STEERED), tmp_path / "cut"
    step = random.randrange(1, 17)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(find_free_port()), "--module", "moepp_ds.train", GOLDEN_RECIPE]
    command += ["--run-dir", str(cut), *sets("parallel.expert_parallel=2", *STEERED)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        try:
            while _lines(cut / "metrics.jsonl") < step and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
        finally:
            kill_group(process.pid)
            process.wait()
    done = _lines(cut / "metrics.jsonl")
    assert step <= done < 20, (tmp_path / "log").read_text()[-3000:]
    saved = bool(candidates(cut / "checkpoints"))  # a kill between the folder and `latest` leaves one, too
    output = train(launch_deepspeed, cut, *STEERED, resume="auto")
    print(f"killed after update {done} of 20")
    assert ("resumed from" in output) == saved
    assert [i for i, record in enumerate(whole, 1) if "gradient_ratio" in record["layers"][0]] == [4, 8, 12, 16, 20]
    assert all(max(map(abs, layer["bias"])) > 0 for layer in whole[0]["layers"])
    assert untimed(cut) == whole
    assert status(cut) == {"state": "completed", "step": 20, "message": ""}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_stop_signal_saves_on_all_ranks(tmp_path: Path) -> None:
    """SIGTERM through launch/train.sh: both ranks stop after the same update, saved."""
    run, whole = tmp_path / "run", 100_000
    command = ["bash", "launch/train.sh", "--num_gpus", "2", GOLDEN_RECIPE, "--run-dir", str(run)]
    command += sets("parallel.expert_parallel=2", "checkpoint.every=1000", f"train.max_steps={whole}")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            while _lines(run / "metrics.jsonl") < 2 and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        finally:
            kill_group(process.pid)
            process.wait()
    said = (tmp_path / "log").read_text()
    assert code == 75, said[-3000:]
    step = status(run)["step"]
    assert status(run) == {"state": "stopped", "step": step, "message": "SIGTERM"}
    assert 2 <= step < whole
    assert (run / "checkpoints/latest").read_text() == f"step-{step:08d}\n"
    assert _lines(run / "metrics.jsonl") == step


def test_plain_python_and_torchrun_are_one_program(tmp_path: Path) -> None:
    """World 1 without a launcher and under torchrun: the same digits, also from int32; a complete run folder."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    starters = {
        "plain": ["-m", "moepp_ds.train"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "moepp_ds.train"],
    }
    for name, starter in starters.items():
        command = [sys.executable, *starter, GOLDEN_RECIPE, "--run-dir", str(tmp_path / name)]
        command += sets("data.token_dtype=int32") if name == "torchrun" else []
        done = subprocess.run(
            command + sets("train.max_steps=4"), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert untimed(tmp_path / "plain") == untimed(tmp_path / "torchrun")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    described = {"recipe.yaml", "ds_config.json", "log.txt", "status.json", ".lock"}
    assert names == described | {"metrics.jsonl", "tensorboard", "checkpoints"}
    given = json.loads((tmp_path / "plain/ds_config.json").read_text())
    assert given["zero_optimization"]["stage"] == 2 and given["gradient_clipping"] == 1.0
    _refused_resume_leaves_no_trace(tmp_path / "plain", environment)


def test_a_source_s_epochs_end_the_run(tmp_path: Path) -> None:
    """`max_epochs` with `stop`: said at the start, the last whole update is saved, the run is complete and stays so."""
    command = [sys.executable, "-m", "moepp_ds.train", GOLDEN_RECIPE, "--run-dir", str(tmp_path / "run")]
    stages = "[{mixture: {pile: 1, dolma: 3}, tokens: 6400}, {mixture: {dolma: 1}}]"
    command += sets("data.max_epochs={pile: 0.03}", f"data.stages={stages}", "data.mixture=null")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    for resume in ("none", "auto"):
        done = subprocess.run(
            [*command, "--resume", resume], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        # floor(0.03 x 29,567 / 64) = 13 rows of pile, one in four: they suffice for 3 updates of 16 rows.
        assert "the run ends after update 3 of 20, at learning rate" in done.stdout
        assert "stage 1: mixture weights sum to 4; they were scaled to sum to 1" in done.stdout
        assert "stage 2 begins at row 100 and the run ends after 48: it is not used" in done.stdout
        assert "epochs at the end: dolma 0.03, pile 0.03" in done.stdout
        assert status(tmp_path / "run") == {"state": "completed", "step": 3, "message": ""}
        assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000003\n"
    record = untimed(tmp_path / "run")[-1]
    assert record["epochs"] == {"dolma": 36 * 64 / 76_993, "pile": 12 * 64 / 29_567} and "validation" in record


def _refused_resume_leaves_no_trace(run: Path, environment: dict[str, str]) -> None:
    """Another order of rows is refused before anything of the run is touched."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    before = files()
    command = [sys.executable, "-m", "moepp_ds.train", GOLDEN_RECIPE, "--run-dir", str(run), "--resume", "auto"]
    command += sets("train.max_steps=6", "data.seed=1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == FAILED_FOR_GOOD
    assert "error: the checkpoint was trained on another order of rows: seed was 0 and is 1." in done.stderr
    assert files() == before


def test_a_loss_that_is_no_number_stops_before_the_update(
    launch_deepspeed: LaunchDeepspeed, tmp_path: Path
) -> None:
    """With an absurd learning rate the run names update, ranks and rows, and saves what was before that update."""
    arguments = [GOLDEN_RECIPE, "--run-dir", str(tmp_path / "run")]
    settings = ["parallel.expert_parallel=2", "train.max_lr=1e30", "train.warmup_steps=0"]
    settings.append("train.precision=bf16")
    done = launch_deepspeed(2, "moepp_ds.train", arguments + sets(*settings))
    assert done.returncode != 0
    assert "not finite" in done.stdout and "the weights were not changed" in done.stdout
    assert "rank 0 rows" in done.stdout and "rank 1 rows" in done.stdout
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["step"], ended["restart"]) == ("failed", 1, False)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000001\n"
    assert {file.name for file in (tmp_path / "run/replay/step-00000002").iterdir()} == {
        *("facts.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors")
    }


@pytest.fixture
def own_process() -> Iterator[None]:
    """Undo what the program does to its process: signal handlers and the process group."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    environment = dict(os.environ)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("own_process")
def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user gets wrong before the engine is built ends with a sentence, and a code that nobody tries again."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    assert main([GOLDEN_RECIPE, "--run-dir", str(run)]) == FAILED_FOR_GOOD
    assert "already holds a run; continue it with --resume auto" in capsys.readouterr().err
    new = ("--run-dir", str(tmp_path / "new"))
    assert main([GOLDEN_RECIPE, *sets("model.vocab_size=256"), *new]) == FAILED_FOR_GOOD
    said = capsys.readouterr().err
    assert "hold token ids up to 511" in said and "model.vocab_size is 256; set it to 512 or more" in said
    assert main([GOLDEN_RECIPE, *new, "--resume", str(tmp_path)]) == FAILED_FOR_GOOD
    assert "is no checkpoint: it holds no index.json" in capsys.readouterr().err
    assert main([GOLDEN_RECIPE, *sets("parallel.expert_parallel=4"), *new]) == FAILED_FOR_GOOD
    assert "does not divide the world of 1 ranks" in capsys.readouterr().err
    assert main([GOLDEN_RECIPE, *sets("data.pathh=x")]) == FAILED_FOR_GOOD
    assert "data.path" in capsys.readouterr().err
