"""Pickle bombs, and their like in YAML and Python, in every file that an import may read: none is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from loaded_models import GOLDEN_SHARDS, moepp
from released_numpy import make_released
from safetensors.torch import load_file, save_file

from data_pipeline.document import DataError
from data_pipeline.tokenizer import load_tokenizer
from moepp_ds.ds_native.reading import Scaler, read_file

GOLDEN = ROOT / "tests" / "golden" / "golden.yaml"


class Bomb:
    """Unpickled by an ordinary unpickler, this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Sneaky(Bomb):
    """The same through what a restricted reader may take for harmless: attribute lookups by name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').system('touch {self.marker}')",)


def _torch(bomb: Bomb, file: Path, *, zipped: bool) -> None:
    content = {"a": torch.zeros(2), "module": {"a": torch.zeros(2)}, "b": bomb}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)


FORMS: dict[str, Callable[[Path, Path], Any]] = {
    "torch's zip": lambda file, marker: _torch(Bomb(marker), file, zipped=True),
    "torch's old form": lambda file, marker: _torch(Bomb(marker), file, zipped=False),
    "eval": lambda file, marker: _torch(Sneaky(marker), file, zipped=True),
    "pickle 0": lambda file, marker: file.write_bytes(pickle.dumps(Bomb(marker), protocol=0)),
    "pickle 4": lambda file, marker: file.write_bytes(pickle.dumps(Bomb(marker), protocol=4)),
    "numpy": lambda file, marker: np.array([Bomb(marker)], dtype=object).dump(file),
    "YAML": lambda file, marker: file.write_text(f"a: !!python/object/apply:os.system ['touch {marker}']\n"),
}
"""Each fits any file's name: what a reader takes it for is its affair."""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.mark.parametrize("form", list(FORMS))
def test_the_bombs_work(tmp_path: Path, marker: Path, form: str) -> None:
    FORMS[form](tmp_path / "bomb", marker)
    if form == "YAML":
        yaml.unsafe_load((tmp_path / "bomb").read_text())
    elif form.startswith(("torch", "eval")):
        torch.load(tmp_path / "bomb", weights_only=False)
    elif form == "numpy":
        np.load(tmp_path / "bomb", allow_pickle=True)
    else:
        pickle.loads((tmp_path / "bomb").read_bytes())
    assert marker.exists()


# -- folders as they should be -----------------------------------------------------------------------------------


def released(folder: Path) -> list[str]:
    """A model folder of the released layout, imported as it is; with all files that one may have."""
    weights, config = make_released(seed=3, vocab_size=512)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return ["import", str(folder)]


def llama(folder: Path) -> list[str]:
    """A dense model of one layer as published, to be upcycled."""
    folder.mkdir()
    sizes = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", **sizes, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5, "hidden_act": "silu"}))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (512, 16),
        "lm_head.weight": (512, 16),
        "model.norm.weight": (16,),
        f"{layer}input_layernorm.weight": (16,),
        f"{layer}post_attention_layernorm.weight": (16,),
        **{f"{layer}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
        **{f"{layer}mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (16, 24),
    }
    save_file({name: torch.randn(shape) / 10 for name, shape in shapes.items()}, folder / "model.safetensors")
    return ["upcycle", "--from", str(folder), "--set", "model.moe.num_ffn_experts=2"]


def sharded(folder: Path, suffix: str) -> None:
    """In place of one file of weights, one with an index, as safetensors or as a pickle."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    name = f"{'model' if suffix == '.safetensors' else 'pytorch_model'}-00001-of-00001{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))


def recipe_file(folder: Path, *, layers: bool) -> Path:
    """A recipe that says of the model what the folder does not."""
    content = yaml.safe_load(GOLDEN.read_text())
    content["deepspeed"] = str(ROOT / content["deepspeed"])
    content["data"]["path"] = str(GOLDEN_SHARDS)
    if not layers:
        content["model"] = {"moe": {"dropless": True}}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], recipe: Path) -> int:
    command, *rest = arguments
    place = [str(tmp_path / "run")]
    words = [command, *place, *rest] if command == "upcycle" else [command, *rest, *place]
    return moepp(monkeypatch, *words, "--recipe", str(recipe))


# -- model folders -----------------------------------------------------------------------------------------------

MODEL_FOLDERS = {"import": released, "upcycle": llama}
WEIGHTS = ["model.safetensors", "pytorch_model.bin"]
SHARDS = [
    ("model.safetensors.index.json", ".safetensors"),
    ("model-00001-of-00001.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", ".bin"),
    ("pytorch_model-00001-of-00001.bin", ".bin"),
]
TOKENIZER = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]


@pytest.mark.parametrize("program", list(MODEL_FOLDERS))
def test_the_folders_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    arguments = MODEL_FOLDERS[program](tmp_path / "m")
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=False)) == 0


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", ["config.json", *WEIGHTS, *[name for name, _ in SHARDS]])
@pytest.mark.parametrize("program", list(MODEL_FOLDERS))
def test_a_bomb_among_the_weights_is_refused(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, program: str, name: str, form: str
) -> None:
    folder = tmp_path / "m"
    arguments = MODEL_FOLDERS[program](folder)
    if name in dict(SHARDS):
        sharded(folder, dict(SHARDS)[name])
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    FORMS[form](folder / name, marker)
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=False)) == 1
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("program", list(MODEL_FOLDERS))
def test_a_bomb_beside_the_weights_is_not_run(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, program: str, form: str
) -> None:
    """A tokenizer that is none is not the shards' tokenizer, no more; other files are not read."""
    folder = tmp_path / "m"
    arguments = MODEL_FOLDERS[program](folder)
    for name in (*TOKENIZER, "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        FORMS[form](folder / name, marker)
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=False)) == 0
    assert not marker.exists()


@pytest.mark.parametrize("program", list(MODEL_FOLDERS))
def test_code_in_a_folder_is_not_run(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    folder = tmp_path / "m"
    arguments = MODEL_FOLDERS[program](folder)
    for name in ("modeling_x", "configuration_x", "tokenization_x", "__init__"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=False)) == 0
    assert not marker.exists()


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer.pkl"])
def test_a_bomb_for_a_tokenizer_is_refused(tmp_path: Path, marker: Path, name: str, form: str) -> None:
    FORMS[form](tmp_path / name, marker)
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path / name)
    assert not marker.exists()


# -- checkpoints of DeepSpeed ------------------------------------------------------------------------------------

MODEL, RANK = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
EXPERT = "layer_0_expert_0_mp_rank_00_model_states.pt"


def model_state(*, zero: bool, experts: int) -> dict[str, Any]:
    """Of one rank, as DeepSpeed saves it; too little of a model for any recipe."""
    return {
        "module": {"a": torch.zeros(2)},
        "buffer_names": [],
        "param_shapes": [{"a": torch.Size([2])}] if zero else None,
        "shared_params": {},
        "global_steps": 1,
        "dp_world_size": 1,
        "num_experts": [experts] if experts else [],
        "ds_version": "0.19.8",
    }


def native(folder: Path, bombed: str) -> list[str]:
    """A checkpoint that is whole as far as it is read before `bombed`."""
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    torch.save(model_state(zero=bombed == RANK, experts=int(bombed == EXPERT)), tag / MODEL)
    return ["import-deepspeed", str(folder)]


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", [MODEL, RANK, EXPERT, "latest"])
def test_a_bomb_in_a_checkpoint_of_deepspeed_is_refused(
    tmp_path: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    form: str,
) -> None:
    arguments = native(tmp_path / "saved", name)
    file = tmp_path / "saved" / ("latest" if name == "latest" else f"global_step1/{name}")
    FORMS[form](file, marker)
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=True)) == 1
    said = capsys.readouterr().err
    assert ("is no tag" if name == "latest" else f"{name} ") in said.replace("\n", " ")
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["module", "ds_config", "client_state", "global_steps", "lr_scheduler"])
def test_a_bomb_anywhere_in_a_state_is_named(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """All that a file asks for is named: here a function and a class, which an own client_state may well hold."""
    arguments = native(tmp_path / "saved", MODEL)
    state = {**model_state(zero=False, experts=0), place: [Bomb(marker), tmp_path]}
    torch.save(state, tmp_path / "saved" / "global_step1" / MODEL)
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=True)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "asks for more than tensors (pathlib.PosixPath, posix.system); nothing of it was run" in said
    assert not marker.exists()


def test_deepspeeds_scripts_are_not_run(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = native(tmp_path / "saved", MODEL)
    for folder in (tmp_path / "saved", tmp_path / "saved" / "global_step1"):
        for name in ("zero_to_fp32.py", "zero_to_torch.py", "__init__.py"):
            (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=True)) == 1
    assert not marker.exists()


def test_a_stand_in_makes_no_code_reachable(tmp_path: Path) -> None:
    """What a record of DeepSpeed's has for its state, whatever it is called, becomes attributes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    scaler = LossScaler(1.0)
    scaler.__dict__.update(__class__="int", __setstate__="touch", __init__="touch", cur_scale="touch")
    torch.save({"loss_scaler": scaler}, tmp_path / RANK)
    found = read_file(tmp_path / RANK)["loss_scaler"]
    assert type(found) is Scaler and vars(found) == vars(scaler)


# -- files of our own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("program", ["import", "upcycle", "import-deepspeed"])
def test_a_bomb_in_a_recipe_is_refused(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, program: str, form: str
) -> None:
    folder = tmp_path / "m"
    arguments = native(folder, MODEL) if program == "import-deepspeed" else MODEL_FOLDERS[program](folder)
    recipe = recipe_file(tmp_path, layers=True)
    FORMS[form](recipe, marker)
    assert run(monkeypatch, tmp_path, arguments, recipe) == 1
    assert not marker.exists()


@pytest.mark.parametrize("form", list(FORMS))
def test_a_bomb_in_a_file_of_names_is_refused(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    arguments = native(tmp_path / "saved", MODEL)
    FORMS[form](tmp_path / "names.yaml", marker)
    arguments = [*arguments, "--names", str(tmp_path / "names.yaml")]
    assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=True)) == 1
    assert "file of names" in " ".join(capsys.readouterr().err.split())
    assert not marker.exists()


def test_a_link_does_not_lead_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tag that `latest` names is a plain name, so that no other folder is read on its word."""
    arguments = native(tmp_path / "saved", MODEL)
    shutil.copytree(tmp_path / "saved" / "global_step1", tmp_path / "elsewhere")
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "."):
        (tmp_path / "saved" / "latest").write_text(name)
        assert run(monkeypatch, tmp_path, arguments, recipe_file(tmp_path, layers=True)) == 1
        assert "is no tag: it must be the plain name" in " ".join(capsys.readouterr().err.split())
