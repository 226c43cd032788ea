"""The same run on other numbers of ranks and other expert parallelism, under the real launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import LaunchDeepspeed
from run_folders import TOLERANCES, finished

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 2))

DESIGNS = {
    "xmoe": (
        ((1, 1), (2, 2)),
        ["router={threshold: 0.7}", "num_ffn_experts=16", "expert_ffn_hidden_size=12", "capacity_factor=8"]
        + ["num_zero=0", "num_copy=0", "num_constant=0"],
    ),
    "budget": (
        ((1, 1), (2, 2), (4, 2)),
        ["router={jitter: 0.05, z_loss_weight: 0.001}", "controller={rate: 0.5}", "balance_scope=global_batch"]
        + ["num_shared_experts=1", "shared_expert_gate=true", "every=2"],
    ),
    "released": (
        ((1, 1), (2, 2)),
        ["variant=released", "router={logit_std: 1.0}", "num_zero=3", "balance=null_averaged", "drop_policy=rank"],
    ),
}
"""Settings of model.moe that between them use what the golden recipe does not, and the layouts that are compared."""


@pytest.mark.parametrize("dropless", ["true", "false"])
def test_layouts_agree(launch_deepspeed: LaunchDeepspeed, tmp_path: Path, dropless: str) -> None:
    """Losses and gradient norms over 20 updates do not depend on ranks or expert parallelism (contract 7)."""
    runs = {}
    for world, ep in LAYOUTS:
        name, setting = f"{dropless}-{world}-{ep}", f"model.moe.dropless={dropless}"
        runs[world, ep] = finished(launch_deepspeed, tmp_path, name, setting, world=world, ep=ep)
    alone = runs[1, 1]
    assert len(alone) == 20
    dropped = max(layer["dropped"] for record in alone for layer in record["layers"])
    assert (dropped == 0) == (dropless == "true")
    compare(f"dropless {dropless}", runs)


@pytest.mark.parametrize("design", DESIGNS)
def test_layouts_agree_on_other_designs(launch_deepspeed: LaunchDeepspeed, tmp_path: Path, design: str) -> None:
    """So do the other routers, expert sets, losses and the controller: what they remember follows from all ranks."""
    layouts, moe = DESIGNS[design]
    settings = [*(f"model.moe.{setting}" for setting in moe), "monitor.gradient_ratio_every=20"]
    runs = {
        (world, ep): finished(launch_deepspeed, tmp_path, f"{design}-{world}-{ep}", *settings, world=world, ep=ep)
        for world, ep in layouts
    }
    compare(design, runs)
    assert max(layer["dropped"] for record in runs[1, 1] for layer in record["layers"]) > 0
    if design != "released":  # where a token's one computing expert weighs 1, only the balance loss moves its router
        ratios = [[layer["gradient_ratio"] for layer in run[-1]["layers"]] for run in runs.values()]
        assert min(ratios[0]) > 0 and ratios == [pytest.approx(ratios[0], rel=1e-2)] * len(ratios)
    for layer in runs[1, 1][-1]["layers"]:
        assert ("bias" in layer) == (design == "budget")
    if design == "budget":
        first, *others = ([bias for layer in run[-1]["layers"] for bias in layer["bias"]] for run in runs.values())
        assert max(map(abs, first)) > 0
        assert others == [pytest.approx(first, abs=1e-3)] * len(others)


def compare(name: str, runs: dict[tuple[int, int], list[dict[str, Any]]]) -> None:
    """Every record of every run with those of one rank."""
    alone = runs[1, 1]
    for layout, run in runs.items():
        for key, tolerance in TOLERANCES.items():
            expected = [record[key] for record in alone]
            worst = max(abs(record[key] / value - 1) for record, value in zip(run, expected))
            print(f"{name}, world and EP {layout}, {key}: {worst:.1e} relative at most")
            assert [record[key] for record in run] == pytest.approx(expected, rel=tolerance), (layout, key)
        for source, score in alone[-1]["validation"].items():
            assert run[-1]["validation"][source] == pytest.approx(score, rel=1e-4), (layout, source)
