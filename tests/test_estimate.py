"""Estimates against numbers typed out, and what the command prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from moepp_ds.__main__ import app
from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.estimate import all_to_all_bytes, estimate

RECIPE = ROOT / "launch/recipes/moepp_0.6b.yaml"
FP32 = ["train.precision=fp32", "deepspeed=ds_configs/zero2_fp32.json"]


def test_time_is_flops_over_what_a_device_does() -> None:
    recipe = load_recipe(RECIPE)
    found = estimate(recipe, 8, device="h200", utilization=0.5)
    assert found.parameters_total == 582_146_352
    assert found.flops_per_update == pytest.approx(3 * found.flops_per_token * 4194304 / 8)
    assert found.seconds_per_update == pytest.approx(found.flops_per_update / (0.5 * 989e12))
    assert found.tokens_per_second == pytest.approx(4194304 / found.seconds_per_update)
    assert (found.updates, found.device_bytes) == (23841, 141 * 10**9)
    assert found.days == pytest.approx(23841 * found.seconds_per_update / 86400)
    again = load_recipe(RECIPE, ["train.activation_checkpointing=full"])
    recomputed = estimate(again, 8, device="h200", utilization=0.5)
    head_and_routers = 768 * 65536 + 12 * 12 * 768 + 11 * 12 * 12
    once = found.flops_per_update / 3 - 2 * (head_and_routers + 12 * 768 * 768) * 4194304 / 8
    assert recomputed.flops_per_update == pytest.approx(found.flops_per_update + once)
    partly = load_recipe(RECIPE, ["train.activation_checkpointing=selective"])
    projections = 2 * 12 * 3 * 768 * 768 * 4194304 / 8
    by_parts = estimate(partly, 8, device="h200", utilization=0.5)
    assert by_parts.flops_per_update == pytest.approx(found.flops_per_update + projections)


@pytest.mark.parametrize(("ways", "share"), [(1, 0), (2, 1 / 2), (8, 7 / 8)])
def test_all_to_all_counts_what_leaves_a_rank(ways: int, share: float) -> None:
    recipe = load_recipe(RECIPE, [f"parallel.expert_parallel={ways}"])
    # tau 0.75, top 2: 2 x 6 / 10 = 1.2 FFN experts a token, in 12 layers; 768 bf16 numbers there and back, twice
    sent = 4194304 / 8 * 1.2 * 12 * share * 4 * 768 * 2
    assert all_to_all_bytes(recipe, 8) == pytest.approx(sent, abs=1)
    recomputed = load_recipe(RECIPE, [f"parallel.expert_parallel={ways}", "train.activation_checkpointing=full"])
    assert all_to_all_bytes(recomputed, 8) == pytest.approx(sent * 1.5, abs=1)
    partly = load_recipe(RECIPE, [f"parallel.expert_parallel={ways}", "train.activation_checkpointing=selective"])
    assert all_to_all_bytes(partly, 8) == pytest.approx(sent, abs=1)


@pytest.mark.parametrize(
    ("overrides", "device", "utilization", "message"),
    [
        ([], "h300", 0.4, "no device is called h300; use a100-40gb, .*, or this to measure"),
        (FP32, "h200", 0.4, "the speed of a h200 is known for bf16 and fp16, not for train.precision fp32"),
        ([], "h200", 1.2, r"a utilization of 1.2 is no share of a device; give one in \(0, 1\]"),
        (["parallel.expert_parallel=2"], "h200", 0.4, "expert_parallel 2 does not divide the world of 3 ranks"),
    ],
)
def test_what_cannot_be_estimated(overrides: list[str], device: str, utilization: float, message: str) -> None:
    world = 3 if "parallel" in str(overrides) else 1
    with pytest.raises(RecipeError, match=message):
        estimate(load_recipe(RECIPE, overrides), world, device=device, utilization=utilization)


def test_this_machine_is_measured() -> None:
    found = estimate(load_recipe(RECIPE, FP32), 1, device="this", utilization=0.9)
    assert found.device_flops > 1e9


def test_command(tmp_path: Path) -> None:
    options = ["--world", "8", "--ep", "8", "--json", str(tmp_path / "found.json")]
    done = CliRunner().invoke(app, ["estimate", str(RECIPE), *options])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["world"], found["expert_parallel"]) == (8, 8)
    assert {"parameters_total", "parameters_activated", "flops_per_token", "all_to_all_bytes"} < set(found)
    assert found["memory"]["device"] == sum(
        item["bytes"] for item in found["memory"]["items"] if item["place"] == "device" and item["sure"]
    )
    assert "GB sent by a rank in an update" in done.output and "of the 141 GB of h200" in done.output
    alone = [str(ROOT / "launch/recipes/moepp_7b.yaml"), "--ep", "1", "--device", "a100-40gb"]
    large = CliRunner().invoke(app, ["estimate", *alone])
    assert large.exit_code == 0 and "too much; what takes less: a smaller train.micro_batch_size" in large.output
