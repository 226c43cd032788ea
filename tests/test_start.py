"""A run that starts from given weights: a folder that training goes on from, on any layout, as from its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, LaunchDeepspeed
from loaded_models import golden_recipe, initial_model, start_run
from run_folders import TOLERANCES, train, untimed
from torch import Tensor

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import find_checkpoint, read_index
from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.controller import RoutingState, restored_state
from moepp_ds.resume import choose_checkpoints
from moepp_ds.start import write_start


def test_shapes_are_those_of_the_model() -> None:
    """No number of it is made, so a model of any size is quick."""
    recipe = golden_recipe()
    assert global_shapes(recipe.model) == {n: list(p.shape) for n, p in initial_model(recipe).named_parameters()}
    large = golden_recipe("model.hidden_size=8192", "model.ffn_hidden_size=32768", "model.moe.num_ffn_experts=64")
    assert global_shapes(large.model)["blocks.0.moe.experts.gate_up_EDG"] == [64, 8192, 65536]


def test_what_a_start_holds(tmp_path: Path) -> None:
    model = start_run(tmp_path / "run")
    names = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*"))
    folder = "checkpoints/step-00000000"
    files = [f"{folder}/index.json", f"{folder}/part-00000.safetensors"]
    assert names == ["checkpoints", "checkpoints/latest", folder, *files, "recipe.yaml"]
    assert load_recipe(tmp_path / "run/recipe.yaml") == golden_recipe()
    index = read_index(tmp_path / "run" / folder)
    nothing_yet = {"step": 0, "tokens": 0, "updates": 0, "data": None, "routing": None, "origin": {"seed": 0}}
    assert {key: index[key] for key in nothing_yet} == nothing_yet
    assert index["kinds"] == ["weight"] and index["loss_scaler"] == {"dynamic": False}
    assert index["recipe"] == golden_recipe().model_dump(mode="json")
    assert index["versions"].keys() == {"torch", "moepp_ds"}
    assert choose_checkpoints(tmp_path / "run", "auto").folders[0] == tmp_path / "run" / folder
    reader = WeightReader(tmp_path / "run" / folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read(name), parameter.detach().flatten())


def test_biases_of_a_controller_may_come_with_it(tmp_path: Path) -> None:
    recipe = golden_recipe("model.moe.controller.rate=0.1")
    pieces = [(name, 0, tensor) for name, tensor in initial_model(recipe).named_parameters()]
    bias_LE = [[0.1, -0.25, 0.0, 1e-9, 0, 0, 0, 0]] * 3
    folder = write_start(tmp_path, recipe, pieces, origin={}, routing={"bias_LE": bias_LE, "share_LE": None})
    state = restored_state(read_index(folder)["routing"], recipe.model.moe, 3)
    assert state == RoutingState(bias_LE=tuple(map(tuple, bias_LE)))


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "checkpoints/latest", "checkpoints/step-00000002/x"])
def test_a_run_is_never_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    said = Path(name).parts[-2 if name.endswith("/x") else -1]
    with pytest.raises(RecipeError, match=rf"already holds a run \({said}\); name another folder, or remove it"):
        write_start(tmp_path, golden_recipe(), [], origin={})
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file; name a folder"):
        write_start(tmp_path / "file", golden_recipe(), [], origin={})


def test_a_start_that_fails_leaves_no_run(tmp_path: Path) -> None:
    """And can be tried again; what else lies in the folder stays."""
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for path in (run, other):
        with pytest.raises(CheckpointError, match="^[0-9]+ parameters did not come whole"):
            write_start(path, golden_recipe(), [("norm.weight", 0, torch.ones(32))], origin={})
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "notes.txt"]
    start_run(other)
    assert find_checkpoint(other / "checkpoints") == other / "checkpoints/step-00000000"


@pytest.mark.parametrize("last", ["checkpoints/latest", "recipe.yaml"])
def test_a_disk_that_fails_at_the_end_leaves_no_run(tmp_path: Path, last: str) -> None:
    recipe, run = golden_recipe(), tmp_path / "run"
    blocked = run / last / "in the way"

    def pieces() -> Iterator[tuple[str, int, Tensor]]:
        blocked.mkdir(parents=True)  # a folder there, and the file can no longer be put in its place
        yield from ((name, 0, tensor) for name, tensor in initial_model(recipe).named_parameters())

    with pytest.raises(CheckpointError, match="cannot be written: .*; free its disk or name another"):
        write_start(run, recipe, pieces(), origin={})
    assert [path for path in run.rglob("*") if path.is_file()] == []
    assert not list(run.glob("checkpoints/step-*"))


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_training_goes_on_from_it_on_any_layout(launch_deepspeed: LaunchDeepspeed, tmp_path: Path) -> None:
    """Started from the weights that training itself starts from, the losses are the golden ones."""
    golden = json.loads((ROOT / "tests/golden/losses.json").read_text())
    records = {}
    for world, ways in ((2, 2), (1, 1)):
        run = tmp_path / f"run-{world}-{ways}"
        start_run(run, "data.path=tests/golden/shards")
        output = train(launch_deepspeed, run, world=world, ep=ways, resume="auto")
        assert f"resumed from {run}/checkpoints/step-00000000 after update 0" in output
        records[world] = untimed(run)
        for key, tolerance in TOLERANCES.items():
            assert [record[key] for record in records[world]] == pytest.approx(golden[key], rel=tolerance)
    for key, tolerance in TOLERANCES.items():
        two, one = ([record[key] for record in records[world]] for world in (2, 1))
        assert one == pytest.approx(two, rel=tolerance)
    assert len(records[1]) == 20
