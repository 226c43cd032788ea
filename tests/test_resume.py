"""Whether a run may go on: decisions from folders and recipes alone, in one process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from damage import set_index
from loaded_models import start_run

from data_pipeline.feed import open_rows
from moepp_ds.agreement import AgreedError
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.choices import Choices, check_resume_word
from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.intent import intended, note_intent
from moepp_ds.resume import Resumption, choose_checkpoints, compare_runs

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


def chosen(path: Path, resume: str) -> list[Path]:
    return choose_checkpoints(path, resume).folders


def test_where_a_run_was_told_to_begin_counts_until_latest_is_written(tmp_path: Path) -> None:
    """A job that was stopped while it started comes back with `auto`."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    hold_run(run, 5, 10)
    hold_run(elsewhere, 7)
    older, newest = (run / f"checkpoints/step-{step:08d}" for step in (5, 10))
    note_intent(run, str(older))
    assert chosen(run, "auto") == [older]
    assert chosen(run, str(newest)) == [newest]
    (run / "checkpoints/latest").unlink()
    (run / "checkpoints/latest").write_text("step-00000010\n")  # written anew
    assert intended(run) is None and chosen(run, "auto") == [newest, older]
    early = tmp_path / "early"
    early.mkdir()
    note_intent(early, str(elsewhere))
    assert chosen(early, "auto") == [elsewhere / "checkpoints/step-00000007"]
    for damage in ("", "[]", '{"resume": 3, "latest": null}', '{"resume": "x"}'):
        (early / ".resume").write_text(damage)
        assert intended(early) is None


def test_a_checkpoint_that_was_moved_away_is_named_by_its_link(tmp_path: Path) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    hold_run(run, 5, 10)
    archive.mkdir()
    link = run / "checkpoints/step-00000005"
    link.rename(archive / link.name)
    link.symlink_to(archive / link.name)
    assert chosen(run, str(link)) == [link]


def test_where_to_go_on(tmp_path: Path) -> None:
    """The newest first, and then what would do if that is damaged."""
    empty, run, early = tmp_path / "empty", tmp_path / "run", tmp_path / "early"
    hold_run(run, 5, 10)
    hold_run(early)  # killed before its first checkpoint
    assert chosen(empty, "none") == []
    assert chosen(empty, "auto") == []
    assert chosen(early, "auto") == []
    older, newest = (run / f"checkpoints/step-{step:08d}" for step in (5, 10))
    assert chosen(run, "auto") == [newest, older]
    assert chosen(run, str(older)) == [older]  # what is named is what is meant
    assert chosen(empty, str(older)) == [older]  # a new run that begins there
    assert chosen(empty, str(run)) == [newest, older]
    assert chosen(run, str(run / "checkpoints")) == [newest, older]
    (run / "checkpoints/latest").write_text("step-00000005\n")
    assert chosen(run, "auto") == [older]  # the other one was left behind
    (run / "checkpoints/latest").unlink()  # killed before the first `latest`
    assert chosen(run, "auto") == [newest, older]


def test_checkpoints_that_are_passed_over_are_named(tmp_path: Path) -> None:
    """Why, each: those without an index are damaged, those that a rollback left behind are not."""
    hold_run(tmp_path, 5, 10, 20)
    root = tmp_path / "checkpoints"
    five, ten, twenty = (root / f"step-{step:08d}" for step in (5, 10, 20))
    assert choose_checkpoints(tmp_path, "auto").passed_over == []
    (twenty / "index.json").unlink()
    no_index = f"{twenty} holds no index.json: it was copied in part, or damaged, or its disk is missing"
    for latest in ("step-00000020", "step-00000010", None):
        (root / "latest").unlink()
        if latest:
            (root / "latest").write_text(latest)
        found = choose_checkpoints(tmp_path, "auto")
        assert (found.folders, found.passed_over) == ([ten, five], [no_index])
        (root / "latest").touch()
    assert choose_checkpoints(tmp_path, str(five)) == Choices([five])  # it was named, and so it is meant
    shutil.rmtree(twenty)
    (root / "latest").write_text("step-00000020\n")
    assert choose_checkpoints(tmp_path, "auto").passed_over == [f"{twenty} is gone, which `latest` names"]
    twenty.symlink_to(tmp_path / "unmounted")
    assert choose_checkpoints(tmp_path, "auto").passed_over == [no_index]
    (root / "latest").write_text("step-00000005\n")
    twenty.unlink()
    found = choose_checkpoints(tmp_path, "auto")
    assert found.folders == [five]
    assert found.passed_over == [
        f"{ten} is later than the one that `latest` names: left behind by a run that went back, or saved right before "
        f"a crash; --resume {ten} goes on from it"
    ]


def status_of(path: Path, checkpoint: object) -> None:
    path.mkdir(exist_ok=True)
    (path / "status.json").write_text(json.dumps({"state": "running", "step": 13, "checkpoint": checkpoint}))


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 14)))
    status_of(tmp_path, "runs/a/checkpoints/step-00000010")
    lost = "holds no checkpoint that is whole, and there was one: status.json says that the run stands on runs/a/check"
    for _ in range(2):
        with pytest.raises(RecipeError, match=lost):
            choose_checkpoints(tmp_path, "auto")
        (tmp_path / "checkpoints").mkdir(exist_ok=True)  # as where a disk is not mounted
    (tmp_path / "metrics.jsonl").unlink()  # or killed in the first update after it went on from another place
    with pytest.raises(RecipeError, match=lost):
        choose_checkpoints(tmp_path, "auto")
    (tmp_path / "status.json").unlink()
    assert choose_checkpoints(tmp_path, "auto") == Choices()


@pytest.mark.parametrize("content", ['{"checkpoint": null}', '{"step": 7}', "[]", "", '{"checkpoint": 7}'])
def test_a_run_that_never_saved_begins_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "checkpoints/.step-00000010.partial").mkdir(parents=True)  # killed in its first save
    (tmp_path / "status.json").write_text(content)
    assert choose_checkpoints(tmp_path, "auto") == Choices()
    (tmp_path / "metrics.jsonl").write_text("no JSON\n")  # that it is damaged is said where it is cut
    assert choose_checkpoints(tmp_path, "auto") == Choices()


def test_checkpoints_without_their_index_are_no_reason_to_start_over(tmp_path: Path) -> None:
    hold_run(tmp_path, 5)
    root = tmp_path / "checkpoints"
    (root / "step-00000005/index.json").unlink()
    for _ in range(2):
        with pytest.raises(RecipeError, match="there was one: .*step-00000005 holds no index.json"):
            choose_checkpoints(tmp_path, "auto")
        (root / "latest").unlink(missing_ok=True)
    (root / "latest").write_text("step-00000005\n")
    (root / "step-00000005").rename(root / ".step-00000005.old-0")
    with pytest.raises(RecipeError, match="there was one: its `latest` says so; .*step-00000005 is gone, which"):
        choose_checkpoints(tmp_path, "auto")


def test_a_run_that_went_on_from_another_place_does_not_start_at_update_1(tmp_path: Path) -> None:
    """Not with `auto`; with the same --resume PATH it begins again, until it has saved."""
    run, other = tmp_path / "run", tmp_path / "other"
    hold_run(other, 0, 5)
    for step in (0, 5):
        start = other / f"checkpoints/step-{step:08d}"
        hold_run(run)
        (run / "metrics.jsonl").write_text(f'{{"step": {step + 1}}}\n')
        status_of(run, str(start))
        evidence = f"the run stands on {start}" if step == 0 else "metrics.jsonl begins with update 6, the run went on"
        with pytest.raises(RecipeError, match=re.escape(evidence)):
            choose_checkpoints(run, "auto")
        assert chosen(run, str(start)) == [start]
        saved = run / "checkpoints/step-00000010"
        status_of(run, str(saved))
        with pytest.raises(RecipeError, match=f"is no checkpoint of it .status.json says .* stands on {saved}"):
            choose_checkpoints(run, str(start))


def test_words_that_name_no_checkpoint(tmp_path: Path) -> None:
    """Found before any rank is started, and by each of them."""
    run, empty = tmp_path / "run", tmp_path / "empty"
    hold_run(run, 5)
    empty.mkdir()
    own = run / "checkpoints/step-00000005"
    for word, message in (
        ("newest", f"--resume newest: there is no such folder; give auto (the newest checkpoint of {run}), none"),
        ("Auto", "--resume Auto: there is no such folder; did you mean auto? give auto"),
        ("step-00000005", f"no such folder; did you mean {own}? give auto"),
        (f"{run}s", f"--resume {run}s: there is no such folder; give auto"),
        ("", "--resume : "),
        (str(empty), f"--resume {empty}: {empty} is no checkpoint: it holds no index.json"),
        (str(run / "metrics.jsonl"), "metrics.jsonl is no checkpoint: it holds no index.json"),
    ):
        for refuses in (check_resume_word, choose_checkpoints):
            with pytest.raises(RecipeError, match=re.escape(message)):
                refuses(run, word)
    for word in ("auto", "none", str(run), str(own), str(run / "checkpoints")):
        check_resume_word(run, word)
    (own / "index.json").unlink()
    with pytest.raises(RecipeError, match="holds no checkpoint that is whole:\n  .*step-00000005 holds no index.json"):
        check_resume_word(empty, str(run))


def test_to_look_for_checkpoints_loads_no_torch() -> None:
    program = "import sys, moepp_ds.checkpoint.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


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
    assert chosen(run, str(five)) == [five]
    for refused in (seven, other):
        with pytest.raises(RecipeError, match="already holds a run"):
            choose_checkpoints(run, str(refused))
    copy = shutil.copytree(five, tmp_path / "best")
    with pytest.raises(RecipeError, match="already holds a run, and .*best is no checkpoint of it .*index.json is dam"):
        choose_checkpoints(run, str(copy))
    (run / "metrics.jsonl").write_text("")  # killed in its first update
    assert chosen(run, str(five)) == [five]
    for damaged in ("{}\n", "6\n", '{"step": "6"}\n', '{"st'):
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
        "learning rate at update 11: 0.00344529 then, 0.00279078 now",
    ]
    assert compare_runs(load_recipe(RECIPE, ["train.max_lr=0.004"]), {**index, "step": 20})[1:] == []  # none is left
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


def test_all_that_differs_is_said_at_once(tmp_path: Path) -> None:
    """Of the recipe and of the data together."""
    start_run(tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step-00000000"
    began, now = load_recipe(RECIPE), load_recipe(RECIPE, ["model.moe.tau=0.5", "data.seed=9"])
    state = {"step": 0, "rows": 0}
    with closing(open_rows(began.data)) as stream:
        state |= {"fingerprint": stream.fingerprint, "order": dict(stream.order), "drawn_by": dict(stream.drawn_by)}
    set_index(folder, lambda index: index.update(data=state))
    with closing(open_rows(now.data)) as stream, pytest.raises(AgreedError) as refused:
        Resumption(Choices([folder]), now, stream)
    said = str(refused.value).splitlines()
    assert said[1:2] == ["  model.moe.tau: 0.75 then, 0.5 now"]
    assert said[2].startswith("the checkpoint was trained on another order of rows: ")
    assert "seed was 0 and is 9" in said[2] and len(said) == 3
    with closing(open_rows(began.data)) as stream:
        found = Resumption(Choices([folder], ["a newer one"]), began, stream)
    assert (found.checkpoint, found.skipped) == (folder, ["a newer one"])


def test_where_every_checkpoint_is_damaged_no_other_one_is_advised(tmp_path: Path) -> None:
    hold_run(tmp_path, 5, 10)
    root = tmp_path / "checkpoints"
    recipe = load_recipe(RECIPE)
    with closing(open_rows(recipe.data)) as stream:
        with pytest.raises(CheckpointError) as refused:
            Resumption(choose_checkpoints(tmp_path, "auto"), recipe, stream)
        said = str(refused.value).splitlines()
        assert ["step-00000010" in said[0], "step-00000005" in said[1]] == [True, True]
        assert not any("another checkpoint" in line for line in said)
        assert said[2:] == [
            f"no checkpoint is left in {root}: bring one back from a copy and name it with --resume PATH, or begin a "
            "new run in another --run-dir"
        ]
        with pytest.raises(CheckpointError, match=f"another one is there: --resume {root}/step-00000010"):
            Resumption(choose_checkpoints(tmp_path, str(root / "step-00000005")), recipe, stream)
