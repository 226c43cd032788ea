"""A run that skips what its guard finds bad: resumed it skips the same, and a replay of what it skipped agrees.

Where the learning rate is tiny, losses are those of the rows alone, and with a narrow bound some are spikes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import LaunchDeepspeed
from run_folders import metrics, train, untimed

from moepp_ds.replay import replay

SETTINGS = (
    *("train.max_lr=1e-6", "train.final_lr=1e-6", "train.warmup_steps=0", "evaluation.every=20"),
    *("safety.on_spike=skip", "safety.spike_above=0.003", "safety.spike_window=8", "safety.max_skips=20"),
)


def guard_at(run: Path, step: int) -> dict[str, object]:
    return json.loads((run / f"checkpoints/step-{step:08d}/index.json").read_text())["guard"]


@pytest.mark.dist
def test_a_resumed_run_skips_what_it_would_have_skipped(launch_deepspeed: LaunchDeepspeed, tmp_path: Path) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(launch_deepspeed, whole, *SETTINGS)
    skipped = [int(folder.name.removeprefix("step-")) for folder in sorted(whole.glob("replay/step-*"))]
    assert skipped and min(skipped) > 8, "the window of 8 updates comes first"
    assert any(step > 10 for step in skipped)
    assert guard_at(whole, 20)["skipped"] == len(skipped)

    train(launch_deepspeed, rest, *SETTINGS, resume=str(whole / "checkpoints" / "step-00000010"))
    assert untimed(rest) == untimed(whole)[10:]
    assert guard_at(rest, 20) == guard_at(whole, 20)
    again = [int(folder.name.removeprefix("step-")) for folder in sorted(rest.glob("replay/step-*"))]
    assert again == [step for step in skipped if step > 10]

    for step in skipped:
        done = replay(whole, step, device=torch.device("cpu"))
        record = metrics(whole)[step - 1]
        assert record["loss"] == done.run_loss and record["grad_norm"] is None
        assert "a spike (safety.spike_above 0.003)" in done.reason
        # Of update 11 the weights before it are there; of the others older ones, at this rate as good as the same.
        assert done.exact == (step == 11)
        assert done.loss == pytest.approx(record["loss"], rel=1e-4)
