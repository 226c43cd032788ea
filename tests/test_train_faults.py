"""Runs that meet damaged checkpoints or data, full disks, bad updates, under the real program; the golden recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import GOLDEN_RECIPE, metrics, sets, status, untimed
from small_disk import run_on_small_disk
from supervised import Running, Start, start  # noqa: F401 (a fixture)

from data_pipeline.row_stream import BLOCK_ROWS
from data_pipeline.shards import read_header
from moepp_ds.supervisor.verdict import FAILED, FAILED_FOR_GOOD, STOPPED

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

EVERY = "checkpoint.every=4"


def run_alone(run: Path, *settings: str, resume: str = "none") -> subprocess.CompletedProcess[str]:
    """The program as one rank of plain Python."""
    command = [sys.executable, "-m", "moepp_ds.train", GOLDEN_RECIPE, "--run-dir", str(run), "--resume", resume]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, *sets(*settings)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def continued(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 updates that nothing disturbed, with checkpoints after 12, 16 and 20."""
    run = tmp_path_factory.mktemp("faults") / "run"
    continued(run_alone(run, EVERY))
    return run


def undone(whole: Path, path: Path) -> Path:
    """A copy of the run as if it had been killed after its checkpoint of update 16."""
    run = path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/step-00000020")
    (run / "checkpoints/latest").write_text("step-00000016\n")
    return run


@pytest.mark.parametrize("file", ["index.json", "rank-00000-of-00001.safetensors"])
def test_a_damaged_newest_checkpoint_is_passed_over(whole: Path, tmp_path: Path, file: str) -> None:
    run = undone(whole, tmp_path)
    damaged = run / "checkpoints/step-00000016" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = continued(run_alone(run, EVERY, resume="auto"))
    assert "warning: a newer checkpoint is passed over: " in said and str(damaged) in said
    assert "step-00000012 after update 12" in said
    assert untimed(run) == untimed(whole)
    continued(run_alone(run, EVERY, resume="auto"))  # what was damaged has been written anew


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_over(whole: Path, tmp_path: Path) -> None:
    run = undone(whole, tmp_path)
    for folder in run.glob("checkpoints/step-*"):
        (folder / "index.json").write_text("{}")
    before = (run / "metrics.jsonl").read_bytes()
    done = run_alone(run, EVERY, resume="auto")
    assert done.returncode == 1
    assert all(f"step-000000{step}" in done.stderr for step in (12, 16))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_where_the_checkpoints_are_gone_the_run_does_not_start_over(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=lambda folder, names: names if folder.endswith("checkpoints") else [])
    before = (run / "metrics.jsonl").read_bytes()
    done = run_alone(run, EVERY, resume="auto")
    assert done.returncode == FAILED_FOR_GOOD
    assert f"{run}/checkpoints holds no checkpoint that is whole, and there was one: status.json says" in done.stderr
    assert f"the run stands on {whole}/checkpoints/step-00000020" in done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def test_saving_in_the_background_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = continued(run_alone(run, EVERY, "checkpoint.background=true"))
    assert untimed(run) == untimed(whole)
    assert [f"saved {run}/checkpoints/step-{step:08d}" in said for step in (4, 8, 12, 16, 20)] == [True] * 5
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {
        *("latest", "step-00000012", "step-00000016", "step-00000020")
    }
    shutil.rmtree(run / "checkpoints/step-00000020")
    (run / "checkpoints/latest").write_text("step-00000016\n")
    continued(run_alone(run, EVERY, resume="auto"))
    assert untimed(run) == untimed(whole)


FULL = """
import json, pathlib, subprocess, sys, time
disk, filler = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], "filler")
run, frees = disk / "run", {"soon": "training goes on", "at the end": "it is tried again for"}.get(sys.argv[2])
pruning = sys.argv[2] == "by pruning"
program = [sys.executable, "-m", "moepp_ds.train", *sys.argv[3:], "--run-dir", str(run)]
train = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
said = ""
for line in train.stdout:
    said += line
    if ("step-00000006" if pruning else "saved") in line and "training goes on" not in said:
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    if frees and frees in line:
        filler.unlink(missing_ok=True)
    if pruning and ("training goes on" in line or "it is tried again for" in line):
        prune = [sys.executable, "-m", "moepp_ds", "checkpoint", "prune", str(run), "--keep", "1"]
        pruned = subprocess.run(prune, capture_output=True, text=True)
        assert pruned.returncode == 0, pruned.stderr
        said += pruned.stdout + pruned.stderr
code, latest = train.wait(), (run / "checkpoints/latest").read_text().strip()
filler.unlink(missing_ok=True)
again = subprocess.run([*program, "--resume", "auto"], stdout=subprocess.PIPE, text=True)
lines = (run / "metrics.jsonl").read_text().splitlines()
print(json.dumps({
    "codes": [code, again.returncode],
    "latest": latest,
    "steps": [json.loads(line)["step"] for line in lines],
    "folders": sorted(path.name for path in (run / "checkpoints").iterdir()),
    "said": said,
}))
"""


@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("frees", ["soon", "at the end", "never"])
def test_a_disk_that_is_full_while_saving(tmp_path: Path, frees: str, background: str) -> None:
    """The run and its last checkpoint live on; a later save finds room, or the last one fails and the run goes on."""
    disk, wait = tmp_path / "disk", 0 if frees == "never" else 60
    settings = sets("checkpoint.every=2", "train.max_steps=24", f"checkpoint.background={background}")
    arguments = [str(disk), frees, GOLDEN_RECIPE, *settings, *sets(f"checkpoint.wait_for_room={wait}")]
    done = run_on_small_disk(disk, "24m", FULL, *arguments)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    said = seen["said"].splitlines()
    warnings = [line for line in said if line.startswith("warning: no checkpoint of update")]
    assert "No space left on device" in warnings[0] and ". A checkpoint takes about " in warnings[0]
    assert re.search(r"prune \S+/run --keep 1`, or .* not name: step-|has no older checkpoint to delete", warnings[0])
    assert any(line.startswith("a checkpoint takes about ") and line.endswith(" MB are free") for line in said)
    assert len(warnings) <= 8  # of up to 22 tries
    assert [line for line in said if "(checkpoint.wait_for_room)" in line] == warnings[-1:] * (frees == "at the end")
    assert "step 24/24" in seen["said"]
    assert "Traceback" not in done.stderr and done.stderr.count("the curves are drawn when there is room") <= 1
    assert seen["codes"] == [1 if frees == "never" else 0, 0]
    assert (seen["latest"] == "step-00000024") == (frees != "never")
    assert seen["steps"] == list(range(1, 25))
    assert not [name for name in seen["folders"] if name.startswith(".")] and "step-00000024" in seen["folders"]


def test_old_checkpoints_make_room_while_the_run_goes_on(tmp_path: Path) -> None:
    """The disk stays full but for what `prune` deletes beside the training run."""
    disk = tmp_path / "disk"
    settings = sets("checkpoint.every=2", "train.max_steps=24", "checkpoint.wait_for_room=60")
    done = run_on_small_disk(disk, "24m", FULL, str(disk), "by pruning", GOLDEN_RECIPE, *settings)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert re.search(r"warning: no checkpoint of update 8: .*by hand .* not name: step-00000002, step-", seen["said"])
    assert "/run: what it is writing is left alone" in seen["said"]
    assert re.search(r"(?m)^deleting \S+/step-00000002  [\d,]+ bytes$", seen["said"])
    assert seen["codes"] == [0, 0] and seen["latest"] == "step-00000024"
    assert "cannot be deleted" not in done.stderr


def test_a_run_that_went_back_does_not_return_to_what_it_left(whole: Path, tmp_path: Path) -> None:
    """It is killed before it has saved anything: what goes on by itself then goes on from where it went to."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    back = str(run / "checkpoints/step-00000012")
    command = [sys.executable, "-m", "moepp_ds.train", GOLDEN_RECIPE, "--run-dir", str(run), "--resume", back]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [*command, *sets(EVERY)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as train:
        assert train.stdout is not None
        (left,) = [line for line in takewhile(lambda line: "step 13/20" not in line, train.stdout) if "behind" in line]
        train.kill()
    assert left.startswith("left behind: step-00000016, step-00000020; each is deleted once this run has saved")
    said = continued(run_alone(run, EVERY, resume="auto"))
    assert f"resumed from {back} after update 12" in said
    assert untimed(run) == untimed(whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_bad_updates_are_skipped_up_to_a_number(tmp_path: Path) -> None:
    """Losses wobble by more than a millionth: one spike is skipped, the second stops the run, and both are kept."""
    run = tmp_path / "run"
    settings = ["safety.spike_above=1e-6", "safety.spike_window=8", "safety.on_spike=skip", "safety.max_skips=1"]
    done = run_alone(run, EVERY, "train.max_lr=0.05", "train.final_lr=0.05", *settings)
    assert done.returncode == FAILED_FOR_GOOD and "(safety.max_skips)" in done.stderr
    assert f"moepp replay {run} --step" in done.stderr
    assert "to go on past it: --resume auto with --set safety.max_skips=2 or more (now 1, all used)" in done.stderr
    ended = status(run)
    assert (ended["state"], ended["restart"]) == ("failed", False)
    first, second = sorted(int(folder.name.removeprefix("step-")) for folder in (run / "replay").iterdir())
    records = {record["step"]: record for record in metrics(run)}
    assert max(records) == ended["step"] == second - 1
    assert records[first - 1]["skipped_updates"] == 0 and records[first]["skipped_updates"] == 1
    assert (run / "checkpoints/latest").read_text() == f"step-{second - 1:08d}\n"
    again = run_alone(run, EVERY, "train.max_lr=0.05", "train.final_lr=0.05", *settings, resume="auto")
    assert again.returncode == FAILED_FOR_GOOD and again.stderr.splitlines()[-1] == done.stderr.splitlines()[-1]
    assert {record["step"]: record["loss"] for record in metrics(run)} == {at: r["loss"] for at, r in records.items()}


def test_a_save_that_fails_does_not_hide_the_bad_update(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way of a folder")
    settings = ["safety.spike_above=1e-6", "safety.spike_window=8", "train.max_lr=0.05", "train.final_lr=0.05"]
    done = run_alone(run, "checkpoint.every=99", *settings)
    ended = status(run)
    assert done.returncode == FAILED_FOR_GOOD and (ended["state"], ended["restart"]) == ("failed", False)
    said = done.stderr.splitlines()[-1]
    assert said == f"error: {ended['message']}"
    assert ": a spike (" in said and f". no checkpoint of update {ended['step']}: " in said


def test_a_monitor_that_cannot_write_does_not_end_the_run(whole: Path, tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}, "csv_monitor": {"enabled": True, "output_path": str(tmp_path)}}
    config["csv_monitor"]["job_name"] = "curves"
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "curves/train_lr.csv").mkdir(parents=True)  # in the way of a file
    run = tmp_path / "run"
    done = run_alone(run, "train.max_steps=2", f"deepspeed={tmp_path / 'ds.json'}")
    assert done.returncode == 0 and "a monitor of the DeepSpeed JSON misses points: " in done.stderr
    assert (tmp_path / "curves/train_loss.csv").exists()


@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_run_does_not_depend_on_who_reads_its_lines(whole: Path, tmp_path: Path, where: str) -> None:
    """The real ranks under the real launcher and supervisor, asked to stop once `| tee` is gone: they save."""
    run, out = tmp_path / "run", os.open("/dev/full", os.O_WRONLY)
    if where == "closed":
        os.close(out)
        read, out = os.pipe()
        os.close(read)
    command = ["bash", "launch/train.sh", "--num_gpus", "1", GOLDEN_RECIPE, "--run-dir", str(run), *sets(EVERY)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    os.close(out)
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.1)
    running.terminate()
    assert running.wait(120) == STOPPED
    step = status(run)["step"]
    assert status(run)["state"] == "stopped" and (run / f"checkpoints/step-{step:08}").is_dir()
    log = (run / "log.txt").read_text()
    assert "saved " in log and f"[train] stopped at step {step}" in log


def test_what_changed_is_said_and_what_may_not_is_refused(whole: Path, tmp_path: Path) -> None:
    run = undone(whole, tmp_path)
    done = run_alone(run, EVERY, "model.moe.tau=0.5", resume="auto")
    assert done.returncode == FAILED_FOR_GOOD and "model.moe.tau: 0.75 then, 0.5 now" in done.stderr
    said = continued(run_alone(run, EVERY, "train.max_lr=0.004", resume="auto"))
    assert "resumed with another train.max_lr: 0.005 then, 0.004 now" in said


def supervised(start: Start, run: Path, *settings: str) -> Running:  # noqa: F811
    """The program on two ranks, which would be started again up to three times."""
    command = ["bash", "launch/train.sh", "--num_gpus", "2", "--max_restarts", "3", "--exit_grace", "5"]
    command += ["--log_level", "warning", GOLDEN_RECIPE, "--run-dir", str(run), *sets(*settings)]
    return start(command, {"DS_ACCELERATOR": "cpu"})


def test_what_is_refused_at_the_start_is_not_started_again(start: Start, tmp_path: Path) -> None:  # noqa: F811
    run = supervised(start, tmp_path / "run", "model.vocab_size=256")
    assert run.code(120) == FAILED
    (said,) = run.said()
    assert re.match("failed before training began: rank.* ended first, with exit code 78; the reason is above", said)
    assert "model.vocab_size is 256; set it to 512 or more" in run.output


def test_data_that_one_rank_cannot_use_are_not_read_again(start: Start, tmp_path: Path) -> None:  # noqa: F811
    """The second file is damaged, from which only rank 1 has rows; all that rank 0 sees is that rank 1 is gone."""
    shards = tmp_path / "shards"
    shutil.copytree(ROOT / "tests/golden/shards", shards)
    damaged = shards / "shards/pile/train/00.jsonl.zst.train"
    content = bytearray(damaged.read_bytes())
    content[read_header(damaged).cuts_offset] ^= 1
    damaged.write_bytes(content)
    # One file after the other, 01 with 8,647 tokens first. Rows are located in blocks, of which each rank has one.
    order = ["data.mixture={pile: 1}", "data.interleave=1", f"data.shuffle_window={BLOCK_ROWS}", "data.seq_len=4"]
    batch = [f"train.micro_batch_size={BLOCK_ROWS}", f"train.batch_tokens={2 * BLOCK_ROWS * 4}"]
    run = supervised(start, tmp_path / "run", f"data.path={shards}", *order, *batch)
    assert run.code(120) == FAILED
    assert "error: [rank 1] source 'pile': the part cuts of its shards do not add up" in run.output
    (said,) = run.said()
    assert "rank 1 ended first, with exit code 78" in said
    # rank 0 can only say that it missed rank 1; the supervisor saw more
    ended = status(run.run_dir)
    assert ended["state"] == "failed" and ended["message"].startswith("rank 1 ended first, with exit code 78")
