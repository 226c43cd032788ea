"""Imported folders: released ones made by hand, our own exported ones, and those that must be refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LaunchDeepspeed
from hf_models import SETTINGS, logits, same_bits, save_model, start, stored
from loaded_models import GOLDEN_SHARDS, moepp
from released_numpy import make_released, released_logits
from run_folders import metrics, sets
from torch import Tensor

from data_pipeline.stream import open_stream
from moepp_ds.config import RecipeError
from moepp_ds.hf_export import export_checkpoint
from moepp_ds.hf_folder import FolderError, HFFolder
from moepp_ds.hf_import import import_folder
from moepp_ds.load import load_model
from moepp_ds.start import Started

FIRST_MAP = "model.layers.0.mlp.moe.gate.gate_map.weight"
TOKENS = [5, 1, 36, 0, 17, 5, 8, 300, 511]

RUN = """
deepspeed: ds_configs/zero2_fp32.json
{model}
data:
  path: {path}
  seq_len: 64
train:
  max_steps: 4
  batch_tokens: 1024
  micro_batch_size: 4
  precision: fp32
  warmup_steps: 1
  max_lr: 1e-3
  final_lr: 1e-4
checkpoint:
  every: 4
"""


def run_recipe(folder: Path, model: str = "", path: Path = GOLDEN_SHARDS) -> Path:
    """A recipe that says of the model no more than `model`."""
    file = folder / "continued.yaml"
    file.write_text(RUN.format(model=model, path=path))
    return file


def released_folder(path: Path, **changes: Any) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    """A folder in the released layout, whose weights and config nothing of this project has touched."""
    weights, config = make_released(seed=3, vocab_size=512, **changes)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    return save_model(path, json.dumps(config), tensors), weights, config


def imported(folder: Path, run: Path, model: str = "") -> Started:
    return import_folder(folder, run, run_recipe(run.parent, model))


FLAGS: Mapping[str, dict[str, Any]] = {
    "as_published": {},
    "one_layer_gate": {"moe_2layer_gate": False},
    "normed_logits": {"moe_use_logits_norm": True, "moe_gate_norm_std": 0.7},
    "mixtral": {"moe_use_mixtral_gating": True},
    "mixtral_normed": {"moe_use_mixtral_gating": True, "moe_use_logits_norm": True, "moe_gate_norm_std": 1.6},
    "input_once": {"moe_feature_no_mul_topk": True},
    "other_base": {"rope_theta": 300.0, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_released_folder_computes_what_its_rules_say(tmp_path: Path, name: str) -> None:
    folder, weights, config = released_folder(tmp_path / "folder", **FLAGS[name])
    expected = torch.from_numpy(released_logits(weights, config, TOKENS))
    imported(folder, tmp_path / "run")
    ours = logits(load_model(tmp_path / "run", device="cpu", dtype=torch.float64), torch.tensor([TOKENS]))
    assert (ours[0] - expected).abs().max() < 1e-9
    assert (of_transformers(folder, torch.float64) - expected).abs().max() < 1e-9
    assert (of_transformers(folder, torch.float32) - expected).abs().max() < 1e-5


def of_transformers(folder: Path, dtype: torch.dtype) -> Tensor:
    """Logits of the class of this package, which the folder itself does not name."""
    from transformers import AutoModelForCausalLM

    import moepp_ds.hf  # noqa: F401  makes the model type known

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double()


def test_a_released_folder_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder, weights, config = released_folder(tmp_path / "folder")
    done = imported(folder, tmp_path / "run")
    assert any(f"{FIRST_MAP} is left behind" in notice for notice in done.notices)
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    back = HFFolder(tmp_path / "back")
    tensors = {name: back.read(name) for name in back.shapes}
    expected = {name: torch.from_numpy(array) for name, array in weights.items()}
    expected[FIRST_MAP] = torch.zeros_like(expected[FIRST_MAP])  # nothing uses it, and we do not keep it
    assert same_bits(tensors, expected)
    assert {key: back.config[key] for key in config if key not in ("max_position_embeddings", "bos_token_id")} == {
        key: value for key, value in config.items() if key not in ("max_position_embeddings", "bos_token_id")
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_exported_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    loaded = start(tmp_path / "run", name)
    export_checkpoint(tmp_path / "run", tmp_path / "folder", max_shard_bytes=200_000)
    done = imported(tmp_path / "folder", tmp_path / "back")
    assert same_bits(stored(tmp_path / "back"), stored(tmp_path / "run"))
    back = load_model(tmp_path / "back", device="cpu")
    assert back.recipe.model == loaded.recipe.model
    if loaded.bias_LE is not None:
        assert back.bias_LE is not None and torch.equal(back.bias_LE, loaded.bias_LE)
    assert back.index["origin"]["program"] == "import"
    assert not [notice for notice in done.notices if "tokenizer" in notice]  # the folder has the shards' own


def test_what_the_recipe_says_of_the_model_is_laid_over_it_and_told(tmp_path: Path) -> None:
    folder, _, _ = released_folder(tmp_path / "folder")
    done = imported(folder, tmp_path / "run", "model:\n  document_attention: true\n  moe: {tau: 0.5, dropless: true}")
    assert done.recipe.model.moe.dropless and done.recipe.model.document_attention
    assert "model.moe.tau: 0.75 in the folder, 0.5 in the recipe" in done.notices
    assert "model.document_attention: False in the folder, True in the recipe" in done.notices


def test_a_controller_starts_at_zero_where_the_folder_has_none(tmp_path: Path) -> None:
    folder, _, _ = released_folder(tmp_path / "folder")
    done = imported(folder, tmp_path / "run", "model: {moe: {controller: {rule: sign}}}")
    assert any("biases for the controller of the recipe; they start at 0" in notice for notice in done.notices)
    bias_LE = load_model(tmp_path / "run", device="cpu").bias_LE
    assert bias_LE is not None and not bias_LE.any()


def test_a_tied_head_becomes_a_copy_of_the_embedding(tmp_path: Path) -> None:
    weights, config = make_released(seed=3, vocab_size=512)
    del weights["lm_head.weight"]
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    folder = save_model(tmp_path / "folder", json.dumps({**config, "tie_word_embeddings": True}), tensors)
    done = imported(folder, tmp_path / "run")
    assert any("copy of the embedding" in notice for notice in done.notices)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    expected = torch.from_numpy(released_logits(weights, config, TOKENS))
    loaded = load_model(tmp_path / "run", device="cpu", dtype=torch.float64)
    assert (logits(loaded, torch.tensor([TOKENS]))[0] - expected).abs().max() < 1e-9
    assert (of_transformers(folder, torch.float64) - expected).abs().max() < 1e-9


def test_a_head_that_is_there_counts_although_the_config_ties_it(tmp_path: Path) -> None:
    weights, config = make_released(seed=3, vocab_size=512)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    folder = save_model(tmp_path / "folder", json.dumps({**config, "tie_word_embeddings": True}), tensors)
    done = imported(folder, tmp_path / "run")
    assert not any("copy of the embedding" in notice for notice in done.notices)
    expected = torch.from_numpy(released_logits(weights, config, TOKENS))
    loaded = load_model(tmp_path / "run", device="cpu", dtype=torch.float64)
    assert (logits(loaded, torch.tensor([TOKENS]))[0] - expected).abs().max() < 1e-9
    assert (of_transformers(folder, torch.float64) - expected).abs().max() < 1e-9


def test_what_only_the_recipe_makes_a_model(tmp_path: Path) -> None:
    start(tmp_path / "old", "paper")
    export_checkpoint(tmp_path / "old", tmp_path / "folder")
    file = tmp_path / "folder" / "config.json"
    config = json.loads(file.read_text())
    config["moe"]["capacity_factor"] = -1.0
    file.write_text(json.dumps(config))
    done = imported(tmp_path / "folder", tmp_path / "run", "model: {moe: {capacity_factor: 1.5}}")
    assert done.notices == ["model.moe.capacity_factor: -1.0 in the folder, 1.5 in the recipe"]


def test_files_of_old_torch_versions_and_of_half_precision(tmp_path: Path) -> None:
    folder, weights, config = released_folder(tmp_path / "folder")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in weights.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(tensors, old / "pytorch_model.bin")
    imported(old, tmp_path / "run")
    found = stored(tmp_path / "run")
    assert torch.equal(found["head.weight"].view(512, 16), tensors["lm_head.weight"].float())


# What must be refused


def test_everything_wrong_with_the_tensors_is_listed_and_nothing_written(tmp_path: Path) -> None:
    weights, config = make_released(seed=3, vocab_size=512)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.moe.experts.experts.5.constant"]
    tensors["model.layers.3.input_layernorm.weight"] = torch.ones(16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100]
    tensors[FIRST_MAP] = torch.ones(3, 3)
    tensors["model.embed_tokens.weight"] = torch.ones(512, 16, dtype=torch.int8)
    folder = save_model(tmp_path / "folder", json.dumps(config), tensors)
    with pytest.raises(FolderError) as caught:
        imported(folder, tmp_path / "run")
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.2.mlp.moe.experts.experts.5.constant [16]",
        "  missing: model.norm.weight [16]",
        "  extra: model.layers.3.input_layernorm.weight [16]",
        "  of another shape: lm_head.weight is [100, 16], the model's is [512, 16]",
        f"  of another shape: {FIRST_MAP} is [3, 3], the model's is [8, 8]",
        "  of another kind: model.embed_tokens.weight is int8, and weights must be plain floating point numbers",
    ]
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_another_size_is_refused(tmp_path: Path) -> None:
    folder, _, _ = released_folder(tmp_path / "folder")
    with pytest.raises(FolderError, match="does not hold this model(.|\n)*missing: model.layers.3") as caught:
        imported(folder, tmp_path / "run", "model: {num_layers: 9}")
    missing = [line for line in str(caught.value).splitlines() if line.startswith("  missing: ")]
    assert {int(line.split(".")[2]) for line in missing} == set(range(3, 9))  # every tensor of all six layers
    assert len({line.split(".", 3)[3] for line in missing}) == len(missing) / 6
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**12}, {"num_experts": [10**12]}])
def test_a_config_of_another_world_is_refused_at_once(tmp_path: Path, change: dict[str, Any]) -> None:
    """Not by a list of all the tensors that it asks for."""
    folder, weights, _ = released_folder(tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FolderError, match=f"holds {len(weights)} tensors, and .* asks for more than"):
        imported(folder, tmp_path / "run")


def test_biases_of_some_layers_are_not_enough(tmp_path: Path) -> None:
    start(tmp_path / "old", "controller")
    export_checkpoint(tmp_path / "old", tmp_path / "folder")
    whole = HFFolder(tmp_path / "folder")
    tensors = {name: whole.read(name) for name in whole.shapes if name != "model.layers.1.mlp.moe.gate.bias"}
    partial = save_model(tmp_path / "partial", json.dumps(whole.config), tensors)
    with pytest.raises(FolderError, match=r"\n  missing: model.layers.1.mlp.moe.gate.bias \[8\]$"):
        imported(partial, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "SwiGLU"),
        ({"num_experts": [8, 6, 8]}, "gating residual with unequal expert counts"),
        ({"model_type": "mixtral"}, "'mixtral' is not imported"),
        ({"hidden_size": "wide"}, "model.hidden_size"),
    ],
)
def test_configs_that_no_recipe_can_say(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    weights, config = make_released(seed=3)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    folder = save_model(tmp_path / "folder", json.dumps({**config, **change}), tensors)
    with pytest.raises(RecipeError, match=said):
        imported(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_keys_in_our_own_section(tmp_path: Path) -> None:
    start(tmp_path / "old", "paper")
    export_checkpoint(tmp_path / "old", tmp_path / "folder")
    file = tmp_path / "folder" / "config.json"
    config = json.loads(file.read_text())
    config["moe"]["num_magic"] = 1
    file.write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="model.moe.num_magic: unknown key"):
        imported(tmp_path / "folder", tmp_path / "run")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    folder, exploded = tmp_path / "folder", tmp_path / "exploded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_released(seed=3)[1]))
    content = {"model.norm.weight": torch.ones(16), "x": Bomb(exploded)}
    if zipped:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(FolderError, match="pytorch_model.bin was refused|pytorch_model.bin is damaged"):
        imported(folder, tmp_path / "run")
    assert not exploded.exists() and not (tmp_path / "run").exists()


def test_shards_of_a_larger_vocabulary_are_refused(tmp_path: Path) -> None:
    weights, config = make_released(seed=3)  # 37 ids
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    folder = save_model(tmp_path / "folder", json.dumps(config), tensors)
    with pytest.raises(RecipeError, match="token ids up to 511, and the model has 37"):
        imported(folder, tmp_path / "run")


def test_missing_shards_and_other_tokenizers_are_told(tmp_path: Path) -> None:
    folder, _, _ = released_folder(tmp_path / "folder")
    done = import_folder(folder, tmp_path / "one", run_recipe(tmp_path, path=tmp_path / "none"))
    assert any("holds no shards yet" in notice for notice in done.notices)
    done = imported(folder, tmp_path / "two")
    assert any("no tokenizer of" in notice for notice in done.notices)


def test_a_run_that_is_there_stays(tmp_path: Path) -> None:
    folder, _, _ = released_folder(tmp_path / "folder")
    imported(folder, tmp_path / "run")
    with pytest.raises(RecipeError, match="already holds a run"):
        imported(folder, tmp_path / "run")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = released_folder(tmp_path / "folder")
    run, recipe = str(tmp_path / "run"), str(run_recipe(tmp_path))
    assert moepp(monkeypatch, "import", str(folder), run, "--recipe", recipe, "--set", "model.moe.tau=0.5") == 0
    said = capsys.readouterr()
    assert f"bash launch/train.sh {run}/recipe.yaml --run-dir {run} --resume auto" in said.out
    assert "note: model.moe.tau: 0.75 in the folder, 0.5 in the recipe" in said.err
    assert moepp(monkeypatch, "import", str(folder), run + " 2", "--recipe", recipe) == 0
    assert f"launch/train.sh '{run} 2/recipe.yaml' --run-dir '{run} 2' --resume auto" in capsys.readouterr().out
    (folder / "model.safetensors").unlink()
    assert moepp(monkeypatch, "import", str(folder), run + "3", "--recipe", recipe) == 1
    assert "holds no weights" in capsys.readouterr().err


@pytest.mark.dist
def test_training_goes_on_from_the_folder_under_expert_parallelism(
    tmp_path: Path, launch_deepspeed: LaunchDeepspeed
) -> None:
    folder, _, _ = released_folder(tmp_path / "folder")
    run = tmp_path / "run"
    recipe = imported(folder, run, "model: {moe: {dropless: true}}").recipe
    loaded = load_model(run, device="cpu")
    rows = torch.from_numpy(open_stream(recipe.data).rows(np.arange(recipe.batch_rows)))
    expected = loaded.model.token_losses(rows).mean().item()
    arguments = [str(run / "recipe.yaml"), "--run-dir", str(run), "--resume", "auto"]
    done = launch_deepspeed(2, "moepp_ds.train", [*arguments, *sets("parallel.expert_parallel=2")])
    assert done.returncode == 0, done.stdout[-3000:]
    records = metrics(run)
    assert records[0]["lm_loss"] == pytest.approx(expected, rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"]
    assert load_model(run, device="cpu").index["step"] == 4
