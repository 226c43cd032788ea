"""`moepp checkpoint show|verify|diff|prune` on folders made here: what they print, refuse and delete."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from damage import Bomb, flip
from typer.testing import CliRunner, Result

from data_pipeline.document import DataError
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.writer import write_weights
from moepp_ds.checkpoint_commands import app

SHAPES = {"a.weight": [3, 4], "b.experts.down_EFD": [2, 2, 5]}
PART = "part-00000.safetensors"


def make(root: Path, step: int = 0, *, seed: int = 0, rate: float = 0.1) -> Path:
    """A checkpoint, which becomes the newest under `root`."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [("a.weight", 0, torch.randn(12, generator=generator)), ("b.experts.down_EFD", 0, torch.zeros(20))]
    recipe = {"name": "small", "train": {"max_lr": rate}, "parallel": {"expert_parallel": 2}}
    facts = {"tokens": 100 * step, "recipe": recipe, "versions": {"torch": "2.13"}, "origin": {"from": "there"}}
    return write_weights(root, pieces, shapes=SHAPES, step=step, facts=facts)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def printed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def refusal(*arguments: object) -> str:
    """What `moepp` prints as its one message."""
    result = run(*arguments)
    assert isinstance(result.exception, (CheckpointError, DataError)), result.output
    return str(result.exception)


def test_show(tmp_path: Path) -> None:
    folder = make(tmp_path / "run/checkpoints", 7)
    sizes = {name: (folder / name).stat().st_size for name in ("index.json", PART)}
    expected = [
        f"checkpoint:  {folder}",
        "update:      7, after 700 tokens",
        "recipe:      small",
        "holds:       weight",
        "parameters:  32 numbers in 2 parameters",
        "versions:    torch 2.13",
        "origin:      {'from': 'there'}",
        f"size:        {sum(sizes.values()):,} bytes",
        *(f"  {name}  {size:,} bytes" for name, size in sizes.items()),
    ]
    for place in (folder, tmp_path / "run", tmp_path / "run/checkpoints"):
        assert printed("show", place).splitlines() == expected
    summary = json.loads(printed("show", folder, "--json"))
    assert (summary["step"], summary["tokens"], summary["kinds"], summary["format"]) == (7, 700, ["weight"], 2)
    assert summary["files"] == sizes and summary["elements"] == 32 and summary["recipe"] == "small"


def test_verify(tmp_path: Path) -> None:
    folder = make(tmp_path / "run/checkpoints", 7)
    assert printed("verify", tmp_path / "run") == f"{folder} is whole\n"
    flip(folder / PART, 9)
    flip(folder / PART, -1)
    lines = refusal("verify", folder).splitlines()
    assert lines[0] == f"{folder} is damaged:"
    assert [line.partition(" in ")[2].partition(";")[0] for line in lines[1:]] == [
        "bytes 0 to 4096",
        f"bytes 4096 to {4096 + 32 * 4}",
    ]
    os.truncate(folder / PART, 77)
    assert f"{PART} has 77 bytes instead of" in refusal("verify", folder)
    flip(folder / "index.json", 50)
    assert "index.json" in refusal("verify", folder)


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    other = make(tmp_path / "other")
    for name in (PART, "index.json", "../latest"):
        folder = make(tmp_path / name.strip("./") / "checkpoints")
        (folder / name).write_bytes(bomb)
        place = folder if name != "../latest" else tmp_path / name.strip("./")
        for words in (("verify", place), ("diff", place, other), ("diff", other, place)):
            refusal(*words)
        if name != PART:  # of the files, `show` reads none
            refusal("show", place)
    assert not exploded.exists()
    pickle.loads(bomb)  # it is a bomb
    assert exploded.exists()


def test_diff(tmp_path: Path) -> None:
    one, same, other = make(tmp_path / "1"), make(tmp_path / "2"), make(tmp_path / "3", 5, seed=1, rate=0.2)
    assert printed("diff", one, same) == "identical: every setting, weight and moment\n"
    assert json.loads(printed("diff", one, same, "--json"))["identical"] is True
    lines = printed("diff", one, other).splitlines()
    assert lines[:4] == ["updates 0 and 5", "settings:", "  train.max_lr  0.1  0.2", "largest difference of a weight:"]
    values = [torch.randn(12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert lines[4:] == [f"  a.weight  {float((values[0] - values[1]).abs().max()):.3g}"]
    found = json.loads(printed("diff", one, other, "--json"))
    assert found["identical"] is False and list(found["weights"]) == ["a.weight"]
    assert found["recipe"] == [["train.max_lr", 0.1, 0.2]]


def test_prune(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    root = run_dir / "checkpoints"
    folders = [make(root, step) for step in (1, 2, 9, 3)]  # resumed from 2, and 9 left behind
    (root / ".step-00000004.partial").mkdir()
    (root / ".step-00000004.partial/file").write_bytes(b"12345")
    everything = sorted(root.iterdir())
    said = printed("prune", run_dir, "--keep", 1, "--dry-run").splitlines()
    assert [line.partition("  ")[0] for line in said] == [
        f"would delete {folders[0]}",
        f"would delete {folders[1]}",
        f"would delete {root / '.step-00000004.partial'}",
    ]
    assert said[2].endswith("  5 bytes")
    assert sorted(root.iterdir()) == everything
    with (run_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "a process is training in" in refusal("prune", run_dir, "--keep", 1)
    flip(folders[3] / PART, 9)
    assert "nothing was deleted, for" in refusal("prune", run_dir, "--keep", 1)
    assert sorted(root.iterdir()) == everything
    flip(folders[3] / PART, 9)
    assert f"deleting {folders[0]}" in printed("prune", run_dir, "--keep", 2)
    names = [path.name for path in sorted(root.iterdir())]
    assert names == ["latest", "step-00000002", "step-00000003", "step-00000009"]
    assert printed("prune", run_dir, "--keep", 2) == ""


@pytest.mark.parametrize("words", [("show",), ("verify",), ("diff", "."), ("prune", "--keep", "1")])
def test_folders_that_are_no_checkpoints(tmp_path: Path, words: tuple[str, ...]) -> None:
    command, *rest = words
    missing = tmp_path / "missing"
    said = refusal(command, missing, *rest)
    assert "does not exist" in said or "holds no checkpoints" in said
    (tmp_path / "empty").mkdir()
    said = refusal(command, tmp_path / "empty", *rest)
    assert "is no checkpoint" in said or "holds no checkpoints" in said
    assert list((tmp_path / "empty").iterdir()) == []
