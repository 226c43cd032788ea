"""Training on raw files under the real launcher: the losses of prepared shards, digit for digit, resumed as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import LaunchDeepspeed, SampleShards
from run_folders import metrics, status, train, untimed

from data_pipeline.build import build_set

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

ORDER = ("data.shuffle_window=32", "data.interleave=2")
HELD_OUT = 0.1


def corpora(sample: SampleShards) -> dict[str, Path]:
    return {name: sample.raw / name for name in ("redpajama", "dolma", "pile")}


def tokenizer(sample: SampleShards) -> Path:
    return sample.raw / "tokenizer/tokenizer.model"


def streamed(sample: SampleShards, spool: Path) -> list[str]:
    """The settings that read the sample's raw files instead of shards."""
    raw: dict[str, Any] = {name: str(path) for name, path in corpora(sample).items()}
    raw |= {"tokenizer": str(tokenizer(sample)), "held_out": HELD_OUT, "disk_bytes": 3_000_000}
    return [*ORDER, "data.mode=stream", f"data.path={spool}", f"data.raw={json.dumps(raw)}"]


def records(run: Path) -> list[dict[str, Any]]:
    """What the arithmetic of two runs shares; bits per byte are of the text that was read, which differs."""
    found = untimed(run)
    for record in found:
        for score in record.get("validation", {}).values():
            del score["bits_per_byte"]
        record.pop("epochs", None)
    return found


class Runs:
    """Runs of six updates over the sample's raw files and over shards of them."""

    def __init__(self, launch: LaunchDeepspeed, sample: SampleShards, folder: Path, *, world: int) -> None:
        self.launch, self.sample, self.folder, self.world = launch, sample, folder, world
        build_set(folder / "set", tokenizer_file=tokenizer(sample), corpora=corpora(sample), held_out=HELD_OUT)

    def prepared(self) -> Path:
        self._run("prepared", [f"data.path={self.folder / 'set'}", *ORDER])
        return self.folder / "prepared"

    def streamed(self, name: str, *, resume: Path | None = None) -> Path:
        spool = self.folder / f"{name}-spool"
        said = self._run(name, streamed(self.sample, spool), "none" if resume is None else str(resume))
        assert ("resumed from" in said) == (resume is not None)
        assert not list((spool / "readers").iterdir())
        return self.folder / name

    def _run(self, name: str, settings: list[str], resume: str = "none") -> str:
        length = ["train.max_steps=6", "checkpoint.every=3", "evaluation.every=3"]
        layout = {"world": self.world, "ep": self.world}
        return train(self.launch, self.folder / name, *length, *settings, **layout, resume=resume)


def test_losses_are_those_of_prepared_shards(
    launch_deepspeed: LaunchDeepspeed, sample_shards: SampleShards, tmp_path: Path
) -> None:
    runs = Runs(launch_deepspeed, sample_shards, tmp_path, world=1)
    prepared, whole = runs.prepared(), runs.streamed("whole")
    assert records(whole) == records(prepared)
    assert "validation" in records(whole)[-1] and status(whole)["state"] == "completed"
    assert metrics(whole)[0]["epochs"].keys() == metrics(prepared)[0]["epochs"].keys()


@pytest.mark.slow
def test_a_resumed_run_makes_its_spool_anew(
    launch_deepspeed: LaunchDeepspeed, sample_shards: SampleShards, tmp_path: Path
) -> None:
    """Two ranks over one spool, then from the middle of the run on with another one."""
    runs = Runs(launch_deepspeed, sample_shards, tmp_path, world=2)
    prepared, whole = runs.prepared(), runs.streamed("whole")
    assert records(whole) == records(prepared)
    resumed = runs.streamed("resumed", resume=whole / "checkpoints/step-00000003")
    assert records(resumed) == records(prepared)[3:]
