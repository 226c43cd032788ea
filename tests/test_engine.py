"""From a recipe to an engine: without a launcher, on a CPU, and (where there is one) on a GPU in every precision.

What DeepSpeed does with several ranks is in test_deepspeed_contract.py and test_train.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from programs import tiny
from run_folders import GOLDEN_RECIPE, metrics, status

from moepp_ds.agreement import AgreedError
from moepp_ds.engine import Ranks, build_engine


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


def train_on_gpu(run: Path, precision: str, *arguments: str) -> list[dict[str, Any]]:
    """Run the golden recipe on one GPU without a launcher; return its records."""
    config = ROOT / "ds_configs" / f"zero2_{'bf16' if precision == 'bf16' else 'fp32'}.json"
    if precision == "fp16":  # so small a model is done before the usual first scale of 2^16 has come down to what fits
        config = run.with_suffix(".json")
        config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 8}}))
    command = [sys.executable, "-m", "moepp_ds.train", GOLDEN_RECIPE, "--run-dir", str(run), *arguments]
    command += ["--set", f"train.precision={precision}", "--set", f"deepspeed={config}"]
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
