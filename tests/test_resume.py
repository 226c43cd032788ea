"""Whether a run may go on: decisions from folders and recipes alone, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.resume import choose_checkpoints, compare_runs

RECIPE = "tests/golden/golden.yaml"


def hold_run(path: Path, *steps: int) -> None:
    """A run folder with a record and complete-looking checkpoints."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    for step in steps:
        folder = path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "index.json").write_text("{}")
    if steps:
        (path / "checkpoints/latest").write_text(f"step-{steps[-1]:08d}\n")


def test_where_to_go_on(tmp_path: Path) -> None:
    """The newest first, and then what would do if that is damaged."""
    empty, run, early = tmp_path / "empty", tmp_path / "run", tmp_path / "early"
    hold_run(run, 5, 10)
    hold_run(early)  # killed before its first checkpoint
    assert choose_checkpoints(empty, "none") == []
    assert choose_checkpoints(empty, "auto") == []
    assert choose_checkpoints(early, "auto") == []
    older, newest = (run / f"checkpoints/step-{step:08d}" for step in (5, 10))
    assert choose_checkpoints(run, "auto") == [newest, older]
    assert choose_checkpoints(run, str(older)) == [older]  # what is named is what is meant
    assert choose_checkpoints(empty, str(older)) == [older]  # a new run that begins there
    assert choose_checkpoints(empty, str(run)) == [newest, older]
    assert choose_checkpoints(run, str(run / "checkpoints")) == [newest, older]
    (run / "checkpoints/latest").write_text("step-00000005\n")
    assert choose_checkpoints(run, "auto") == [older]  # the other one was left behind
    (run / "checkpoints/latest").unlink()  # killed before the first `latest`
    assert choose_checkpoints(run, "auto") == [newest, older]


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path: Path) -> None:
    hold_run(tmp_path, 5)
    (tmp_path / "checkpoints/step-00000005").rename(tmp_path / "checkpoints/.step-00000005.old-0")
    with pytest.raises(RecipeError, match="holds no checkpoint, and its `latest` says that there was one: the run"):
        choose_checkpoints(tmp_path, "auto")


def test_no_record_is_overwritten(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    hold_run(run, 5)
    hold_run(other, 7)
    with pytest.raises(RecipeError, match="already holds a run; continue it with --resume auto, or name another"):
        choose_checkpoints(run, "none")
    with pytest.raises(RecipeError, match="already holds a run, and .*other.* is no checkpoint of it"):
        choose_checkpoints(run, str(other / "checkpoints/step-00000007"))


def test_a_run_that_ended_before_its_first_save_begins_again(tmp_path: Path) -> None:
    """Where it began, and nowhere else: a record of other updates stays."""
    run, other = tmp_path / "run", tmp_path / "other"
    hold_run(run)
    hold_run(other, 5, 7)
    five, seven = (other / f"checkpoints/step-{step:08d}" for step in (5, 7))
    (run / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n')
    assert choose_checkpoints(run, str(five)) == [five]
    for refused in (seven, other):
        with pytest.raises(RecipeError, match="already holds a run"):
            choose_checkpoints(run, str(refused))
    for damaged in ("", "{}\n", "6\n", '{"step": "6"}\n', '{"st'):
        (run / "metrics.jsonl").write_text(damaged)
        with pytest.raises(RecipeError, match="already holds a run"):
            choose_checkpoints(run, str(five))
    (run / "metrics.jsonl").write_text('{"step": 6}\n')
    hold_run(run, 3)
    with pytest.raises(RecipeError, match="already holds a run"):
        choose_checkpoints(run, str(five))


def test_what_may_change(tmp_path: Path) -> None:
    """Other learning rates are named and allowed; another model or batch is refused, every difference at once."""
    index = {"recipe": load_recipe(RECIPE).model_dump(mode="json"), "step": 10}
    with pytest.raises(RecipeError, match="the run's length: 10 updates are done, the recipe ends after 5"):
        compare_runs(load_recipe(RECIPE, ["train.max_steps=5"]), index)
    assert compare_runs(load_recipe(RECIPE), index) == []
    changed = load_recipe(RECIPE, ["train.max_lr=0.004", "checkpoint.every=5"])
    assert compare_runs(changed, index) == [
        "checkpoint.every: 10 then, 5 now",
        "train.max_lr: 0.005 then, 0.004 now",
    ]
    settings = ["model.hidden_size=64", "model.moe.tau=0.5", "train.micro_batch_size=2", "train.max_lr=0.004"]
    with pytest.raises(RecipeError) as refused:
        compare_runs(load_recipe(RECIPE, settings), index)
    assert str(refused.value) == (
        "the checkpoint is of another run; restore these in the recipe, or start a new run:\n"
        "  model.head_dim: 16 then, 32 now\n"
        "  model.hidden_size: 32 then, 64 now\n"
        "  model.moe.tau: 0.75 then, 0.5 now\n"
        "  train.micro_batch_size: 4 then, 2 now"
    )
