"""From a recipe to an engine: without a launcher, on a CPU, and (where there is one) on a GPU in every precision.

What DeepSpeed does with several ranks is in test_deepspeed_contract.py and test_train.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, find_free_port, kill_group
from programs import tiny
from programs.checks import expect, start
from run_folders import GOLDEN_RECIPE, metrics, status

from moepp_ds.agreement import AgreedError
from moepp_ds.config import RecipeError
from moepp_ds.engine import LostRankError, Ranks, build_engine, choose_algorithms, naming_lost_ranks


def bare_environment() -> dict[str, str]:
    """This environment without what a launcher, or the choice of a CPU, puts there."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    return {key: value for key, value in os.environ.items() if key not in left_out}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What a process found that no launcher started."""
    command = [sys.executable, "-m", "tests.programs.engine_checks"]
    environment = {**bare_environment(), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert done.returncode == 0 and len(found) == 1, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[0])


def test_a_process_without_a_launcher_is_the_only_rank(alone: dict[str, Any]) -> None:
    assert (alone["rank"], alone["world"], alone["device"]) == (0, 1, "cpu")
    assert alone["is_first"] and alone["same_again"] and alone["backend"] == "gloo"
    assert alone["environment"] == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def test_the_configuration_returned_is_the_one_that_was_given(alone: dict[str, Any]) -> None:
    """DeepSpeed changes the dictionary it gets; what a run keeps in ds_config.json must not show that."""
    assert alone["given"] == alone["expected"]
    assert alone["given"]["gradient_clipping"] == 0.5
    assert alone["given"]["train_micro_batch_size_per_gpu"] == tiny.MICRO_BATCH


def test_the_engine_starts_as_the_recipe_says(alone: dict[str, Any]) -> None:
    assert alone["weights"] == ["torch.bfloat16"]
    assert set(alone["rates"]) == {alone["first_rate"]}


def test_fp16_is_refused_on_a_cpu() -> None:
    asked = tiny.recipe("deepspeed=ds_configs/zero2_fp32.json", "train.precision=fp16")
    with pytest.raises(AgreedError, match="^train.precision fp16 needs a GPU; use bf16 or fp32 on a CPU$"):
        build_engine(asked, Ranks(0, 1, torch.device("cpu")), eos_id=0)


# -- ranks that do not come --------------------------------------------------------------------------------------


def lines_with(log: Path, word: str, seconds: float) -> list[str]:
    """The lines of a growing file that hold a word, waited for."""
    end = time.monotonic() + seconds
    while True:
        found = [line for line in log.read_text(errors="replace").splitlines() if word in line]
        if found or time.monotonic() > end:
            return found
        time.sleep(0.2)


@pytest.mark.dist
@pytest.mark.parametrize("where", ["world", "experts"])
def test_a_rank_that_sleeps_ends_the_wait_of_the_others(tmp_path: Path, where: str) -> None:
    """After safety.collective_timeout, in the groups that DeepSpeed makes as well, with a message that helps."""
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(find_free_port()), "--module", "tests.programs.slow_rank", where, "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with log.open("wb") as out:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        (said,) = lines_with(log, "ENDED", 100.0)
    finally:
        kill_group(job.pid)
        job.wait()
    assert int(said.split("after ")[1].split()[0]) < 30
    assert "rank 0 waited in vain for another rank, 2 s (safety.collective_timeout)" in said
    assert "raise the limit" in said and "Timed out waiting 2000ms" in said


def test_other_errors_stay_as_they_are() -> None:
    ranks = Ranks(1, 2, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="^shapes$") as error, naming_lost_ranks(tiny.recipe(), ranks):
        raise RuntimeError("shapes")
    assert not isinstance(error.value, LostRankError)
    with pytest.raises(LostRankError, match="rank 1 lost the connection to another rank. .* words: store"):
        with naming_lost_ranks(tiny.recipe(), ranks):
            raise torch.distributed.DistNetworkError("store")


# -- the same bits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deterministic(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("deterministic")
    arguments = [str(folder / "first.json")]
    return start("tests.programs.determinism_checks", arguments, world=2, log=folder / "log.txt"), folder


@pytest.mark.dist
@pytest.mark.parametrize(
    "name",
    [
        "runs_are_the_same_bits",
        "a_recipe_without_it_allows_everything_again",
        "activation_checkpointing_changes_no_bit",
        "compiling_changes_rounding_alone",
        "other_micro_batches_change_rounding_alone_where_none_are_counted",
        "bf16_is_near_fp32",
    ],
)
def test_what_is_identical(deterministic: tuple[dict[str, str], Path], name: str) -> None:
    expect(deterministic[0], name)


@pytest.mark.dist
def test_another_start_gives_the_same_bits(deterministic: tuple[dict[str, str], Path]) -> None:
    """Losses, weights and moments of two starts of two ranks, in fp32 and in bf16."""
    _, folder = deterministic
    arguments = [str(folder / "second.json"), "once"]
    expect(
        start("tests.programs.determinism_checks", arguments, world=2, log=folder / "again.txt"),
        "runs_are_the_same_bits",
    )
    first, second = (json.loads((folder / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first == second and len(first["bf16"]) > 60


def test_cublas_must_be_able_to_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gpu = tiny.recipe("train.deterministic=true"), torch.device("cuda", 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(RecipeError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 in the env.* :4096:8 or :16:8; unset it"):
        choose_algorithms(asked, gpu)
    choose_algorithms(tiny.recipe(), gpu)  # nobody asked
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        choose_algorithms(asked, gpu)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and torch.are_deterministic_algorithms_enabled()
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        choose_algorithms(asked, gpu)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        choose_algorithms(tiny.recipe(), gpu)


def test_what_has_no_deterministic_form_is_refused() -> None:
    """On a GPU; on a CPU a running sum is always the same."""
    threshold = ("model.moe.router.threshold=0.5", "model.moe.top_k=null", "model.moe.dropless=true")
    asked = tiny.recipe("train.deterministic=true", *threshold)
    with pytest.raises(RecipeError, match="with model.moe.router.threshold: .*; use top_k, or train.det"):
        choose_algorithms(asked, torch.device("cuda", 0))
    try:
        choose_algorithms(asked, torch.device("cpu"))
    finally:
        choose_algorithms(tiny.recipe(), torch.device("cpu"))


# -- a GPU -------------------------------------------------------------------------------------------------------


def train_on_gpu(run: Path, precision: str, *arguments: str) -> list[dict[str, Any]]:
    """Run the golden recipe on one GPU without a launcher; return its records."""
    config = ROOT / "ds_configs" / f"zero2_{'bf16' if precision == 'bf16' else 'fp32'}.json"
    if precision == "fp16":  # so small a model is done before the usual first scale of 2^16 has come down to what fits
        config = run.with_suffix(".json")
        config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 8}}))
    command = [sys.executable, "-m", "moepp_ds.train", GOLDEN_RECIPE, "--run-dir", str(run)]
    command += ["--set", f"train.precision={precision}", "--set", f"deepspeed={config}", *arguments]
    environment = bare_environment()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert status(run) == {"state": "completed", "step": 20, "message": ""}
    return metrics(run)


def column(records: list[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-3), ("fp16", 2e-3)])
def test_a_gpu_learns_saves_and_resumes(tmp_path: Path, precision: str, tolerance: float) -> None:
    """20 updates in each precision: losses near those of the CPU in fp32, also after a resume."""
    run = train_on_gpu(tmp_path / "run", precision)
    losses = column(run, "loss")
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[4] < losses[0]
    assert all(map(math.isfinite, column(run, "grad_norm")))
    golden = json.loads((ROOT / "tests/golden/losses.json").read_text())
    assert losses == pytest.approx(golden["loss"], rel=tolerance)
    for scores in (record["validation"] for record in run if "validation" in record):
        assert all(math.isfinite(source["loss"]) for source in scores.values())

    checkpoint = tmp_path / "run/checkpoints/step-00000010"
    resumed = train_on_gpu(tmp_path / "resumed", precision, "--resume", str(checkpoint))
    assert column(resumed, "step") == list(range(11, 21))
    assert column(resumed, "loss") == pytest.approx(losses[10:], rel=tolerance)


@pytest.mark.gpu
def test_a_gpu_repeats_itself(tmp_path: Path) -> None:
    """Two deterministic runs in bf16 write the same losses and norms, digit for digit."""
    asked = ("--set", "train.deterministic=true")
    first, second = (train_on_gpu(tmp_path / name, "bf16", *asked) for name in ("first", "second"))
    assert column(first, "loss") == column(second, "loss")
    assert column(first, "grad_norm") == column(second, "grad_norm")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_with_its_optimizer_on_the_host(tmp_path: Path, precision: str) -> None:
    """The losses of a run without offload, also after a resume from that one's checkpoint."""
    offload = ("--set", f"deepspeed={ROOT}/ds_configs/zero2_offload.json")
    tolerance = 1e-3 if precision == "fp32" else 2e-3
    losses = column(train_on_gpu(tmp_path / "device", precision), "loss")
    assert column(train_on_gpu(tmp_path / "host", precision, *offload), "loss") == pytest.approx(losses, rel=tolerance)
    checkpoint = str(tmp_path / "device/checkpoints/step-00000010")
    resumed = train_on_gpu(tmp_path / "resumed", precision, "--resume", checkpoint, *offload)
    assert column(resumed, "loss") == pytest.approx(losses[10:], rel=tolerance)
