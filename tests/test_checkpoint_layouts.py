"""Any layout goes on from the checkpoint of any other: every bit of it, and the same losses afterwards.

A layout is (ranks, expert parallelism); they alternate between ZeRO stages 1 and 2. The ring, which always runs, goes
through all six layouts and back to the first; `--slow` tries every pair of layouts and stages.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from conftest import LaunchDeepspeed

pytestmark = pytest.mark.dist

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
RING = ["1-1-1", "2-1-2", "2-2-1", "4-1-2", "4-2-1", "4-4-2", "1-1-2"]
TOLERANCE = 1e-4


def do(launch: LaunchDeepspeed, folder: Path, jobs: list[tuple[str, str, str]], timeout: float) -> None:
    """Do jobs (name, layout, name of the one whose checkpoint it takes up) in order, with few starts of ranks.

    Assert of each that it went on as the run that it took up.
    """
    for world, some in groupby(jobs, key=lambda job: int(job[1][0])):
        words = [f"{name}={layout}:{source}".rstrip(":") for name, layout, source in some]
        done = launch(world, "tests.programs.layout_checks", [str(folder), *words], timeout)
        assert done.returncode == 0, done.stdout[-3000:]
    for name, layout, source in jobs:
        if source:
            judge(source, layout, json.loads((folder / name / "losses.json").read_text()))


def judge(source: str, layout: str, found: dict[str, Any]) -> None:
    assert found["identical"], f"{found['job']}: what was saved right after loading is not what was loaded"
    expected = [loss for loss, _ in found["expected"]]
    losses = [loss for loss, _ in found["losses"][: len(expected)]]
    worst = max(abs(loss / value - 1) for loss, value in zip(losses, expected))
    print(f"{layout} goes on from {source}: {len(expected)} losses within {worst:.1e} relative, every bit restored")
    assert len(expected) == 20 and losses == pytest.approx(expected, rel=TOLERANCE), found["job"]


@pytest.mark.timeout(900)
def test_ring(launch_deepspeed: LaunchDeepspeed, tmp_path: Path) -> None:
    names = [f"{number}-{layout}" for number, layout in enumerate(RING)]
    do(launch_deepspeed, tmp_path, list(zip(names, RING, ["", *names])), timeout=250)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_pair(launch_deepspeed: LaunchDeepspeed, tmp_path: Path) -> None:
    """36 pairs of layouts, each with ZeRO stages 1 and 2 on either side."""
    every = [f"{world}-{ways}-{stage}" for world, ways in LAYOUTS for stage in (1, 2)]
    first = [(layout, layout, "") for layout in every]
    then = [(f"{layout}-after-{source}", layout, source) for layout in every for source in every]
    do(launch_deepspeed, tmp_path, first + then, timeout=1800)
