"""The measurement of saving runs on real ranks, reports what it promises, and leaves nothing. Times are not judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import LaunchDeepspeed
from run_folders import sets

from moepp_ds.bench.save import main


def test_no_measurement_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch/recipes/quickstart.yaml", "--folder", ".", "--repeats", "0"])
    assert "--repeats 0: give 1 or more" in capsys.readouterr().err


@pytest.mark.dist
def test_measures_and_leaves_nothing(launch_deepspeed: LaunchDeepspeed, tmp_path: Path) -> None:
    settings = sets("deepspeed=ds_configs/zero2_fp32.json", "train.precision=fp32", "model.num_layers=1")
    folder = tmp_path / "not/yet/there"
    arguments = ["launch/recipes/quickstart.yaml", "--folder", str(folder), "--repeats", "2", *settings]
    done = launch_deepspeed(2, "moepp_ds.bench.save", [*arguments, "--json", str(tmp_path / "found.json")])
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".log"] == ["found.json"]
    assert found["ranks"] == len(found["fragment_bytes"]) == 2 and min(found["fragment_bytes"]) > 2**20
    assert {name: len(times) for name, times in found["seconds"].items()} == {
        "plain": 2,
        "foreground": 2,
        "background": 2,
    }
    assert sorted(found["of_plain"]) == ["background", "foreground"]
    assert sorted(found["memory_bytes"]) == ["background", "foreground", "load"]
    assert "2 ranks, up to " in done.stdout and " of the plain write" in done.stdout
