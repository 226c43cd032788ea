"""`moepp checkpoint list|show|verify|diff|prune` on folders made here: what they print, refuse and delete."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from damage import Bomb, flip, set_index
from typer.testing import CliRunner, Result

from data_pipeline.document import DataError
from data_pipeline.locks import take
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
        if name == "../latest":  # it names nothing
            assert printed("verify", place) == f"{folder} is whole\n"
            continue
        refusal("verify", place)
        for words in (("diff", place, other), ("diff", other, place)):
            assert run(*words).exit_code == 2
        if name != PART:  # of the files, `show` and `list` read none
            refusal("show", place)
        printed("list", folder.parent)
    assert not exploded.exists()
    pickle.loads(bomb)  # it is a bomb
    assert exploded.exists()


def test_diff(tmp_path: Path) -> None:
    """Exit codes as of `cmp`: 0 identical, 1 different, 2 nothing to compare."""
    one, same, other = make(tmp_path / "1"), make(tmp_path / "2"), make(tmp_path / "3", 5, seed=1, rate=0.2)
    assert printed("diff", one, same) == "identical: every setting, weight and moment\n"
    assert json.loads(printed("diff", one, same, "--json"))["identical"] is True
    done = run("diff", one, other)
    lines = done.output.splitlines()
    assert done.exit_code == 1
    assert lines[:4] == ["updates 0 and 5", "settings:", "  train.max_lr  0.1  0.2", "largest difference of a weight:"]
    values = [torch.randn(12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert lines[4:] == [f"  a.weight  {float((values[0] - values[1]).abs().max()):.3g}"]
    done = run("diff", one, other, "--json")
    found = json.loads(done.output)
    assert done.exit_code == 1
    assert found["identical"] is False and list(found["weights"]) == ["a.weight"]
    assert found["recipe"] == [["train.max_lr", 0.1, 0.2]]
    done = run("diff", one, tmp_path / "nowhere")
    assert done.exit_code == 2 and "error: " in done.output and "does not exist" in done.output


def test_diff_of_moments(tmp_path: Path) -> None:
    """In one pass with the weights, of which each stays with its own kind."""

    def with_moments(root: Path, change: float = 0.0) -> Path:
        pieces = [("a.weight", 0, torch.ones(12)), ("b.experts.down_EFD", 0, torch.zeros(20))]
        moments = [
            (kind, name, start, values + change * (kind == "exp_avg_sq" and name == "a.weight"))
            for kind in ("exp_avg", "exp_avg_sq")
            for name, start, values in pieces
        ]
        return write_weights(root, pieces, shapes=SHAPES, step=0, facts={}, moments=moments)

    one, same, other = (with_moments(tmp_path / name, change) for name, change in (("1", 0.0), ("2", 0.0), ("3", 0.5)))
    assert json.loads(printed("diff", one, same, "--json"))["identical"] is True
    found = json.loads(run("diff", one, other, "--json").output)
    assert (found["identical"], found["weights"], found["moments"]) == (False, {}, ["a.weight"])
    assert "the weights are identical" in run("diff", one, other).output


def listed(*arguments: object) -> list[list[str]]:
    """The cells of what `list` prints."""
    return [re.split("  +", line.strip()) for line in printed("list", *arguments).splitlines()]


def test_list(tmp_path: Path) -> None:
    """What a look at indexes and sizes shows, and what a resume takes: not what is damaged."""
    root = tmp_path / "run/checkpoints"
    two, five, nine, seven = (make(root, step) for step in (2, 5, 9, 7))  # resumed from 5, and 9 left behind
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (two, five, seven, nine)]
    size = [f"{size:,}" for size in sizes]
    head = [[f"{root}:"], ["update", "tokens", "bytes"]]
    assert listed(tmp_path / "run") == [
        *head,
        ["2", "200", size[0], "complete"],
        ["5", "500", size[1], "complete"],
        ["7", "700", size[2], "latest, next", "complete"],
        ["9", "900", size[3], "complete"],
    ]
    whole = (seven / PART).stat().st_size
    os.truncate(seven / PART, 77)
    (nine / "index.json").unlink()
    (root / ".step-00000008.partial").mkdir()
    (root / ".step-00000008.partial/file").write_bytes(b"12345")
    assert listed(root)[2:] == [
        ["2", "200", size[0], "complete"],
        ["5", "500", size[1], "next", "complete"],
        ["7", "700", size[2], "latest", f"damaged: {seven / PART} has 77 bytes instead of {whole}"],
        ["9", "?", f"{(nine / PART).stat().st_size:,}", f"damaged: {nine} is no checkpoint: it holds no index.json"],
        [f"being written or deleted, or left over: {root / '.step-00000008.partial'}", "5 bytes"],
    ]
    found = json.loads(printed("list", root, "--json"))
    assert [(row["step"], row["latest"], row["taken"], row["problem"] is None) for row in found["checkpoints"]] == [
        (2, False, False, True),
        (5, False, True, True),
        (7, True, False, False),
        (9, False, False, False),
    ]
    assert found["unfinished"] == {str(root / ".step-00000008.partial"): 5}
    for folder in (two, five, nine):
        shutil.rmtree(folder)
    seven.rename(tmp_path / "away")
    assert listed(root)[:2] == [[f"{root} holds no checkpoint"], ["`latest` names step-00000007, which is gone"]]
    assert "holds no folder checkpoints/; name a run's folder" in refusal("list", tmp_path)
    assert "does not exist; name a run's folder" in refusal("list", tmp_path / "nowhere")


def test_what_a_resume_would_find_is_found(tmp_path: Path) -> None:
    """Without `latest`, and where what it names is gone or has no index; what is passed over is said."""
    root = tmp_path / "run/checkpoints"
    two, five = (make(root, step) for step in (2, 5))
    (root / "latest").unlink()
    assert printed("verify", tmp_path / "run") == f"{five} is whole\n"
    (five / "index.json").unlink()
    for latest in ("step-00000005", "step-00000007"):
        (root / "latest").write_text(latest)
        said = printed("show", tmp_path / "run")
        assert f"checkpoint:  {two}" in said and "note: a newer checkpoint is passed over: " in said
        assert run("diff", root, two).exit_code == 0
    (two / "index.json").unlink()
    assert "holds no checkpoint that is whole:" in refusal("show", tmp_path / "run")


def test_verify_all(tmp_path: Path) -> None:
    root = tmp_path / "run/checkpoints"
    folders = [make(root, step) for step in (1, 2, 3)]
    whole = [f"{folder} is whole" for folder in folders]
    assert printed("verify", tmp_path / "run", "--all").splitlines() == whole
    flip(folders[0] / PART, 9)
    flip(folders[0] / PART, -1)
    (folders[1] / "index.json").unlink()
    done = run("verify", root, "--all")
    assert done.exit_code == 1
    first, second, third, last = done.output.splitlines()
    problem = f"{folders[0] / PART} does not match its checksums in bytes 0 to 4096 (and 1 more)"
    assert first == f"{folders[0]} is damaged: {problem}"
    assert second == f"{folders[1]} is damaged: {folders[1]} is no checkpoint: it holds no index.json"
    assert (third, last) == (whole[2], "2 of 3 checkpoints are damaged")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert "holds no checkpoint; name a run's folder" in refusal("verify", tmp_path / "empty", "--all")


@pytest.mark.parametrize("value", [5, "text", [1], {"parallel": [2]}, {"parallel": "none"}, None])
def test_what_a_run_wrote_into_an_index_may_be_anything(tmp_path: Path, value: object) -> None:
    folder, same = make(tmp_path / "1"), make(tmp_path / "2")
    set_index(folder, lambda index: index.update(recipe=value, layout=value, updates=value))
    assert "update:      0, after 0 tokens" in printed("show", folder)
    printed("list", folder.parent)
    done = run("diff", folder, same)
    assert done.exit_code == 1 and "settings:" in done.output


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
    flip(folders[3] / PART, 9)
    assert "nothing was deleted, for" in refusal("prune", run_dir, "--keep", 1)
    assert sorted(root.iterdir()) == everything
    flip(folders[3] / PART, 9)
    assert f"deleting {folders[0]}" in printed("prune", run_dir, "--keep", 2)
    names = [path.name for path in sorted(root.iterdir())]
    assert names == ["latest", "step-00000002", "step-00000003", "step-00000009"]
    assert printed("prune", run_dir, "--keep", 2) == ""


def test_prune_while_the_run_is_training(tmp_path: Path) -> None:
    """Checkpoints before the newest go; what a save is writing, or has set aside to put it back, is left to it."""
    run_dir = tmp_path / "run"
    root = run_dir / "checkpoints"
    for step in (1, 2, 9, 3):
        make(root, step)
    live = [".step-00000003.old-0", ".step-00000004.partial", ".step-00000009.old-0", ".unfinished-12345678-latest"]
    for name in (*live, ".step-00000002.old-0"):
        (root / name).mkdir()
    with closing(take(run_dir / ".lock")):
        said = printed("prune", run_dir, "--keep", 1, "--dry-run").splitlines()
        assert said[0].endswith(f"is training in {run_dir}: what it is writing is left alone")
        assert [line.split("/")[-1].split()[0] for line in said[1:]] == [
            *("step-00000001", "step-00000002", ".step-00000002.old-0")
        ]
        printed("prune", run_dir, "--keep", 1)
    assert sorted(path.name for path in root.iterdir()) == [*live, "latest", "step-00000003", "step-00000009"]


def test_prune_leaves_milestones(tmp_path: Path) -> None:
    """Those of the recipe in the newest checkpoint, or of the command line."""
    root = tmp_path / "checkpoints"
    for step in range(9):
        make(root, step)

    def gone(*options: object) -> list[int]:
        said = printed("prune", tmp_path, "--keep", 1, "--dry-run", *options)
        return [int(line.split("step-")[1].split()[0]) for line in said.splitlines()]

    assert gone() == list(range(8))
    set_index(root / "step-00000008", lambda index: index["recipe"].update(checkpoint={"keep_every": 3}))
    assert gone() == [1, 2, 4, 5, 7]
    assert gone("--keep-every", 0) == list(range(8))
    assert gone("--keep-every", 2) == [1, 3, 5]  # 8 is a milestone, and one other stays
    printed("prune", tmp_path, "--keep", 1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", *(f"step-0000000{step}" for step in (0, 3, 6, 8))]


@pytest.mark.parametrize("words", [("show",), ("verify",), ("diff", "."), ("prune", "--keep", "1")])
def test_folders_that_are_no_checkpoints(tmp_path: Path, words: tuple[str, ...]) -> None:
    command, *rest = words

    def said(place: Path) -> str:
        return run(command, place, *rest).output if command == "diff" else refusal(command, place, *rest)

    missing = said(tmp_path / "missing")
    assert "does not exist" in missing or "holds no checkpoints" in missing
    (tmp_path / "empty").mkdir()
    empty = said(tmp_path / "empty")
    assert "is no checkpoint" in empty or "holds no checkpoints" in empty
    assert list((tmp_path / "empty").iterdir()) == []
