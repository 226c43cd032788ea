"""The same run on other numbers of ranks and other expert parallelism, under the real launcher."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import LaunchDeepspeed
from run_folders import TOLERANCES, finished

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 2))


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
    for layout, run in runs.items():
        for key, tolerance in TOLERANCES.items():
            expected = [record[key] for record in alone]
            worst = max(abs(record[key] / value - 1) for record, value in zip(run, expected))
            print(f"dropless {dropless}, world and EP {layout}, {key}: {worst:.1e} relative at most")
            assert [record[key] for record in run] == pytest.approx(expected, rel=tolerance), (layout, key)
        for source, score in alone[-1]["validation"].items():
            assert run[-1]["validation"][source] == pytest.approx(score, rel=1e-4), (layout, source)
