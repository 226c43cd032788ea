"""An update once more: the run's own numbers (in ranks: tests/programs/replay_checks.py), and where they went wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from loaded_models import golden_recipe, initial_model, moepp
from programs.checks import expect, start

from data_pipeline.document import DataError
from data_pipeline.loader import Batch
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.checkpoint.writer import write_weights
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.replay import Replay, chosen_device, replay
from moepp_ds.replay_rows import Facts, rows_folder, write_rows

CPU = torch.device("cpu")


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_replay_gives_the_runs_numbers(tmp_path: Path, world: int) -> None:
    found = start("tests.programs.replay_checks", [str(tmp_path)], world=world, log=tmp_path / "log.txt")
    expect(found, "replay_gives_the_runs_numbers")
    if world == 2:
        expect(found, "one_rank_that_cannot_write_is_known_to_all")


def tiny_recipe(*settings: str) -> Recipe:
    """8 rows of 8 tokens an update, in micro batches of 4."""
    return golden_recipe("data.seq_len=8", "train.batch_tokens=64", "train.micro_batch_size=4", *settings)


def batch(start: int) -> Batch:
    generator = torch.Generator().manual_seed(start)
    tokens = torch.randint(0, 512, (4, 9), generator=generator).numpy()
    return Batch(tokens, start, torch.tensor([0, 1, 0, 1]).numpy())


def facts_of(recipe: Recipe, **changes: object) -> Facts:
    said = {
        "step": 3,
        "reason": "update 3 was bad",
        "loss": math.nan,
        "world": 1,
        "eos_id": 2,
        "recipe": recipe.model_dump(mode="json"),
        "routing": {"bias_LE": None, "share_LE": None},
        "source_names": ["dolma", "pile"],
    }
    return Facts.model_validate({**said, **changes})


@torch.no_grad()
def stopped_run(
    run: Path, *settings: str, scale: tuple[str, float] | None = None, steps: Sequence[int] = (2,)
) -> Path:
    """A run whose third update was not taken; scale: a parameter that is multiplied."""
    recipe = tiny_recipe(*settings)
    model = initial_model(recipe)
    if scale is not None:
        model.get_parameter(scale[0]).mul_(scale[1])
    shapes = global_shapes(recipe.model)
    for step in steps:
        pieces = [(name, 0, parameter.detach()) for name, parameter in model.named_parameters()]
        write_weights(run / "checkpoints", pieces, shapes=shapes, step=step, facts={})
    assert write_rows(rows_folder(run, 3), 0, [batch(16), batch(20)], facts_of(recipe)) is None
    return run


def done(run: Path) -> Replay:
    return replay(run, 3, device=CPU)


def test_it_is_the_model_itself_that_is_run(tmp_path: Path) -> None:
    """Losses and gradients equal those of the model called by hand on all rows at once, which here change nothing."""
    found = done(stopped_run(tmp_path, "model.moe.balance=none", "model.moe.dropless=true"))
    model = initial_model(tiny_recipe("model.moe.balance=none", "model.moe.dropless=true"))
    output = model(torch.cat([torch.from_numpy(batch(at).tokens_BS1) for at in (16, 20)]))
    output.loss.backward()
    assert found.loss == pytest.approx(output.loss.item(), rel=1e-6)
    expected = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert found.grad_norms == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found.grad_norm == pytest.approx(math.hypot(*expected.values()), rel=1e-5)
    assert [row.source for row in found.passes[0].rows] == ["dolma", "pile", "dolma", "pile"]
    assert [(one.rank, one.row_start) for one in found.passes] == [(0, 16), (0, 20)]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_first_module_that_overflows_is_named(tmp_path: Path, recompute: str) -> None:
    scaled = ("blocks.1.attention.v_proj.weight", 5e37)
    settings = [f"train.activation_checkpointing={recompute}", "model.init_std=1.0"]
    found = done(stopped_run(tmp_path, *settings, scale=scaled))
    assert {one.bad_output for one in found.passes} == {"blocks.1.attention"}
    assert math.isnan(found.loss) and found.run_loss is None


def test_the_first_gradient_that_overflows_is_named_after_the_module_it_comes_to(tmp_path: Path) -> None:
    """All states are zero, so every loss is ln 512; only on the way back is the last norm's 1e19 taken to the third."""
    found = done(stopped_run(tmp_path, "model.norm_eps=1e-38", "model.init_std=1.0", scale=("embedding.weight", 0.0)))
    assert all(one.bad_output is None for one in found.passes)
    assert [one.lm_loss for one in found.passes] == pytest.approx([math.log(512)] * 2)
    assert {one.bad_gradient for one in found.passes} == {"blocks.2"}
    assert not math.isfinite(found.grad_norm) and math.isfinite(found.grad_norms["head.weight"])


def test_an_older_checkpoint_is_taken_and_said_where_the_one_before_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of update 1, not of 3 or later, which the bad update comes before."""
    run = stopped_run(tmp_path / "run", steps=(0, 1, 3, 10))
    assert moepp(monkeypatch, "replay", str(run), "--step", "3", "--device", "cpu", "--json", f"{tmp_path}/out") == 0
    said = capsys.readouterr().out
    assert "update 3 was bad" in said and "the run saved none after update 2: what follows is near" in said
    for words in ("bad output", "gradient of", "dolma", "in the run not finite"):
        assert words in said
    written = json.loads((tmp_path / "out").read_text())
    assert (written["checkpoint_step"], written["exact"], written["run_loss"]) == (1, False, None)
    assert len(written["passes"]) == 2 and len(written["passes"][0]["rows"]) == 4
    assert written["grad_norms"].keys() == global_shapes(tiny_recipe().model).keys()
    named = replay(run, 3, device=CPU, checkpoint=run / "checkpoints" / "step-00000010")
    assert (named.checkpoint_step, named.exact) == (10, False)


def test_what_cannot_be_replayed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped_run(tmp_path / "run")
    with pytest.raises(DataError, match="run holds no rows of update 4; there are those of 3"):
        replay(run, 4, device=CPU)
    with pytest.raises(DataError, match="no rows of update 4; it holds none at all: rows are written when"):
        replay(tmp_path, 4, device=CPU)
    with pytest.raises(DataError, match="nowhere is no folder; name a run's, such as runs/NAME"):
        replay(tmp_path / "nowhere", 4, device=CPU)
    assert moepp(monkeypatch, "replay", str(run), "--step", "4") == 1
    other = stopped_run(tmp_path / "other", "model.hidden_size=16")
    with pytest.raises(RecipeError, match="holds another model than the one that did the update"):
        replay(run, 3, device=CPU, checkpoint=other / "checkpoints")
    late = stopped_run(tmp_path / "late", steps=(3,))
    with pytest.raises(CheckpointError, match="holds no checkpoint from before update 3; name one with --checkpoint"):
        done(late)
    with pytest.raises(RecipeError, match="--device nowhere cannot be used: "):
        chosen_device("nowhere")


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    run = stopped_run(tmp_path)
    folder = rows_folder(run, 3)
    rows, facts = folder / "rank-00000-of-00001.safetensors", folder / "facts.json"
    good, said = rows.read_bytes(), facts.read_bytes()

    def refused(pattern: str) -> None:
        with pytest.raises((DataError, RecipeError), match=pattern):
            done(run)
        rows.write_bytes(good)
        facts.write_bytes(said)

    rows.write_bytes(good[:-5])
    refused("safetensors cannot be read")
    rows.unlink()
    refused("cannot be read: .*No such file")
    facts.write_bytes(said[:-9])
    refused("facts.json cannot be read")
    facts.write_text(facts.read_text().replace('"world"', '"worlds"'))
    refused("facts.json cannot be read")
    facts.write_text(facts.read_text().replace('"vocab_size":512', '"vocab_size":300').replace('": 512', '": 300'))
    refused("is damaged: it holds the number [345]..; those there are 0 to 299")
    short = Batch(batch(20).tokens_BS1[:3], 20, batch(20).source_B[:3])
    write_rows(folder, 0, [batch(16), short], facts_of(tiny_recipe()))
    refused(r"is damaged: rows \[20, 21, 22\] are no micro batch")
    write_rows(folder, 0, [batch(16)], facts_of(tiny_recipe(), routing={"bias_LE": [[1.0]], "share_LE": None}))
    with pytest.raises(DataError, match="routing of update 3 of .* is damaged"):
        done(run)
