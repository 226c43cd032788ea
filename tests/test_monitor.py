"""The run folder: metrics worked out by hand, files that read as if the run had never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import status
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moepp_ds.controller import RoutingState
from moepp_ds.kinds import ExpertKinds
from moepp_ds.monitor import FolderInUse, RunFolder, layer_metrics, progress_line, scalars
from moepp_ds.statistics import RoutingStatistics

KINDS = ExpertKinds(num_ffn=2, num_constant=2, num_copy=1, num_zero=1)


def statistics(wanted_LE: list[list[int]], kept_LE: list[list[int]], **more: Any) -> RoutingStatistics:
    """Counts of some layers; what a test does not look at is 0."""
    zeros_L = torch.zeros(len(wanted_LE), dtype=torch.float64)
    values: dict[str, Any] = {
        "wanted_E": wanted_LE,
        "kept_E": kept_LE,
        "first_E": torch.zeros_like(torch.tensor(wanted_LE)),
        "histogram_H": [[0, 0, 0]] * len(wanted_LE),
        **dict.fromkeys(("entropy", "top_1", "top_2", "balance"), zeros_L),
        **more,
    }
    return RoutingStatistics(**{name: torch.as_tensor(value) for name, value in values.items()})


def test_layer_metrics_of_one_layer() -> None:
    # 10 tokens choose 2 experts each: 20 assignments, of which the first FFN expert drops 2 and the copy expert 3
    counted = statistics(
        [[8, 2, 1, 2, 5, 2]],
        [[6, 2, 1, 2, 2, 2]],
        histogram_H=[[3, 6, 1]],
        entropy=[12.0],
        top_1=[5.0],
        top_2=[2.5],
        balance=[11.0],
    )
    (layer,) = layer_metrics(counted, kinds=KINDS, tokens=10)
    assert layer == {
        "share": {"ffn": 0.5, "constant": 0.15, "copy": 0.25, "zero": 0.1},
        "ffn_experts_per_token": 0.8,
        "wanted_ffn_experts_per_token": 1.0,
        "ffn_experts_histogram": [0.3, 0.6, 0.1],
        "dropped": 0.25,
        "dropped_share": {"ffn": 0.2, "constant": 0.0, "copy": 0.6, "zero": 0.0},
        "ffn_load": [1.5, 0.5],  # 6 and 2 around their mean of 4
        "balance": 1.1,
        "entropy": 1.2,
        "top_1": 0.5,
        "top_2": 0.25,
    }


def test_layer_metrics_have_only_the_kinds_there_are() -> None:
    counted = statistics([[3, 1], [4, 0]], [[3, 1], [2, 0]])
    first, second = layer_metrics(counted, kinds=ExpertKinds(2, 0, 0, 0), tokens=4)
    assert (first["share"], first["dropped_share"], first["ffn_load"]) == ({"ffn": 1.0}, {"ffn": 0.0}, [1.5, 0.5])
    assert (second["share"], second["dropped_share"], second["ffn_load"]) == ({"ffn": 1.0}, {"ffn": 0.5}, [2.0, 0.0])


def test_layer_metrics_when_no_ffn_expert_is_chosen() -> None:
    counted = statistics([[0, 0, 0, 0, 0, 4]], [[0, 0, 0, 0, 0, 4]])
    (layer,) = layer_metrics(counted, kinds=KINDS, tokens=4)
    assert (layer["ffn_experts_per_token"], layer["ffn_load"]) == (0.0, [0.0, 0.0])
    assert layer["share"] == {"ffn": 0.0, "constant": 0.0, "copy": 0.0, "zero": 1.0}
    assert layer["dropped_share"] == {"zero": 0.0}  # of what nobody chose no share can be dropped


def test_layer_metrics_show_the_biases_of_ffn_experts_and_the_gradient_ratio() -> None:
    counted, state = statistics([[1] * 6] * 2, [[1] * 6] * 2), RoutingState(bias_LE=((0.5, -0.5, 0, 0, 0, 0),) * 2)
    layers = layer_metrics(counted, kinds=KINDS, tokens=3, state=state, gradient_ratio_L=[0.25, 4.0])
    assert [layer["bias"] for layer in layers] == [[0.5, -0.5]] * 2
    assert [layer["gradient_ratio"] for layer in layers] == [0.25, 4.0]


def metrics(step: int, **more: Any) -> dict[str, Any]:
    layers = layer_metrics(statistics([[8, 2, 1, 2, 5, 2]], [[6, 2, 1, 2, 2, 2]]), kinds=KINDS, tokens=10)
    return {"step": step, "loss": 5.0 - step, "layers": layers, **more}


def test_scalars_are_named_by_their_place() -> None:
    record = {key: value for key, value in metrics(2).items() if key != "step"}
    record |= {"sampled_share": {"redpajama/book": 0.25}, "validation": {"dolma": {"loss": 4, "tokens": 64}}}
    assert scalars(record) == [
        ("train/loss", 3.0),
        ("layers/00/share/ffn", 0.5),
        ("layers/00/share/constant", 0.15),
        ("layers/00/share/copy", 0.25),
        ("layers/00/share/zero", 0.1),
        ("layers/00/ffn_experts_per_token", 0.8),
        ("layers/00/wanted_ffn_experts_per_token", 1.0),
        ("layers/00/ffn_experts_histogram/00", 0.0),
        ("layers/00/ffn_experts_histogram/01", 0.0),
        ("layers/00/ffn_experts_histogram/02", 0.0),
        ("layers/00/dropped", 0.25),
        ("layers/00/dropped_share/ffn", 0.2),
        ("layers/00/dropped_share/constant", 0.0),
        ("layers/00/dropped_share/copy", 0.6),
        ("layers/00/dropped_share/zero", 0.0),
        ("layers/00/ffn_load/00", 1.5),
        ("layers/00/ffn_load/01", 0.5),
        ("layers/00/balance", 0.0),
        ("layers/00/entropy", 0.0),
        ("layers/00/top_1", 0.0),
        ("layers/00/top_2", 0.0),
        ("sampled_share/redpajama/book", 0.25),
        ("validation/dolma/loss", 4.0),
        ("validation/dolma/tokens", 64.0),
    ]


def folder_with(path: Path, steps: range, *, resumed_step: int = 0, tensorboard: bool = False) -> RunFolder:
    folder = RunFolder(path, tensorboard=tensorboard, resumed_step=resumed_step)
    for step in steps:
        folder.record(metrics(step))
    return folder


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_object_a_line_and_there_at_once(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, range(1, 4))
    assert recorded(tmp_path) == [metrics(1), metrics(2), metrics(3)]  # before it is closed
    folder.close()


def test_resuming_drops_the_metrics_after_the_checkpoint(tmp_path: Path) -> None:
    folder_with(tmp_path, range(1, 6)).close()
    folder_with(tmp_path, range(4, 5), resumed_step=3).close()
    assert [record["step"] for record in recorded(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_resuming_drops_a_last_line_that_was_cut_off(tmp_path: Path, cut: int) -> None:
    folder_with(tmp_path, range(1, 4)).close()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])  # without its newline alone, too: it may be a longer number's start
    folder_with(tmp_path, range(3, 5), resumed_step=2).close()
    assert recorded(tmp_path) == [metrics(step) for step in (1, 2, 3, 4)]


def test_what_follows_the_checkpoint_need_not_be_whole(tmp_path: Path) -> None:
    """A power cut may leave blocks of zeros in what was not synced; before the checkpoint they are refused."""
    file = tmp_path / "metrics.jsonl"
    folder_with(tmp_path, range(1, 4)).close()
    file.write_bytes(file.read_bytes() + bytes(9) + b"}\n" + b'{"step": 5}\n')
    with pytest.raises(ValueError, match="line 4 of .*metrics.jsonl is damaged .*; delete the file from there on"):
        folder_with(tmp_path, range(0), resumed_step=4)
    folder_with(tmp_path, range(4, 5), resumed_step=3).close()
    assert recorded(tmp_path) == [metrics(step) for step in (1, 2, 3, 4)]


def test_starting_over_drops_all_metrics(tmp_path: Path) -> None:
    folder_with(tmp_path, range(1, 4)).close()
    folder_with(tmp_path, range(1, 2), resumed_step=0).close()
    assert [record["step"] for record in recorded(tmp_path)] == [1]


def test_status_says_how_the_run_stands(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, range(0))
    folder.set_status("running", step=4)
    assert status(tmp_path) == {"state": "running", "step": 4, "message": ""}
    folder.set_status("failed", step=5, message="loss of update 6 is not finite", restart=False)
    assert status(tmp_path) == {
        "state": "failed",
        "step": 5,
        "message": "loss of update 6 is not finite",
        "restart": False,
    }
    folder.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "log.txt", "metrics.jsonl", "status.json"]


def test_what_is_said_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("first run, Zürich", "second run"):
        folder = folder_with(tmp_path, range(0))
        folder.say(line)
        folder.close()
    assert capsys.readouterr().out == "first run, Zürich\nsecond run\n"
    kept = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[len("2026-01-31 23:59:59 +0000  ") :] for line in kept] == ["first run, Zürich", "second run"]


def test_describe_stores_recipe_and_deepspeed_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, range(0))
    folder.describe(recipe="name: tiny\n", ds_config={"zero_optimization": {"stage": 2}})
    folder.close()
    assert (tmp_path / "recipe.yaml").read_text() == "name: tiny\n"
    assert json.loads((tmp_path / "ds_config.json").read_text()) == {"zero_optimization": {"stage": 2}}


def curve(path: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_curves_are_readable_and_purged_when_resuming(tmp_path: Path) -> None:
    folder_with(tmp_path, range(1, 6), tensorboard=True).close()
    assert curve(tmp_path, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0), (5, 0.0)]
    folder = RunFolder(tmp_path, tensorboard=True, resumed_step=3)
    folder.record(metrics(4) | {"loss": 7.5})
    folder.close()
    assert curve(tmp_path, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 7.5)]
    assert curve(tmp_path, "layers/00/ffn_load/00") == [(step, 1.5) for step in range(1, 5)]


def test_a_killed_process_leaves_metrics_and_curves(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from moepp_ds.monitor import RunFolder\n"
        "folder = RunFolder(pathlib.Path(sys.argv[1]), tensorboard=True, resumed_step=0)\n"
        "folder.record({'step': 1, 'loss': 2.5})\n"
        "folder.sync()\n"
        "folder.record({'step': 2, 'loss': float('inf')})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, check=False)
    assert killed.returncode == -9
    assert recorded(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]  # JSON has no infinity
    assert curve(tmp_path, "train/loss") == [(1, 2.5)]


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    """The second is refused before it touches anything; the folder is free again once the first is closed."""
    first = RunFolder(tmp_path, tensorboard=False, resumed_step=0)
    first.record({"step": 1, "loss": 2.5})
    with pytest.raises(FolderInUse, match=r"^process \d+ on .* is training in .*; wait for it, stop it, or"):
        RunFolder(tmp_path, tensorboard=False, resumed_step=0)
    first.close()
    assert recorded(tmp_path) == [{"step": 1, "loss": 2.5}]
    RunFolder(tmp_path, tensorboard=False, resumed_step=1).close()


def test_progress_line() -> None:
    record = metrics(3, lm_loss=1.95, grad_norm=0.5, lr=3e-4, tokens_per_s=12345.6)
    assert progress_line(record, total_steps=200, seconds_left=3725.4) == (
        "step   3/200  loss 2.0000  lm 1.9500  grad 0.500  lr 3.00e-04  12,346 tokens/s  0.80 FFN experts/token  "
        "ETA 1:02:05"
    )
