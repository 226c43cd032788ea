"""Exported folders: what transformers makes of them, in a process that has nothing else, is our own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hf_models import LAYOUTS, SETTINGS, logits, start, stored
from loaded_models import GOLDEN_SHARDS, golden_recipe, initial_model, moepp, start_run
from torch import Tensor

from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.generate import generate
from moepp_ds.hf_export import export_checkpoint, parse_size
from moepp_ds.hf_export.card import _training, _without_places
from moepp_ds.hf_folder import FolderError, HFFolder
from moepp_ds.hf_names import bias_names, parts
from moepp_ds.load import LoadedModel
from moepp_ds.start import write_start

NEW = 12
TEXTS = ["Hello, world!", "", "  two </s> <s>\n\tand <unk> \u4f60\u597d \U0001f642", "a" * 50]
TOKENS_BS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Exports:
    """Our models, their folders, and what another process says of the folders."""

    loaded: Mapping[str, LoadedModel]
    folders: Mapping[str, Path]
    answers: Mapping[str, Any]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("exports")
    loaded, folders = {}, {}
    for name in SETTINGS:
        loaded[name] = start(root / "runs" / name, name)
        folders[name] = root / "folders" / name
        done = export_checkpoint(root / "runs" / name, folders[name])
        assert done.layout == LAYOUTS[name]
    folders["paper_bf16"] = root / "folders" / "paper_bf16"
    export_checkpoint(root / "runs" / "controller", folders["paper_bf16"], dtype=torch.bfloat16)
    return Exports(loaded, folders, ask_another_process(root, folders))


def ask_another_process(root: Path, folders: Mapping[str, Path]) -> Any:
    """What `programs/hf_reader.py` answers, run with no path to this project and no network."""
    request = {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "tokens": TOKENS_BS.tolist(),
        "texts": TEXTS,
        "new": NEW,
    }
    (root / "request.json").write_text(json.dumps(request))
    program = str(ROOT / "tests" / "programs" / "hf_reader.py")
    command = [sys.executable, "-I", program, str(root / "request.json"), str(root / "answer.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "answer.json").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_ours(exports: Exports, name: str) -> None:
    ours = logits(exports.loaded[name], TOKENS_BS)
    theirs = torch.tensor(exports.answers[name]["logits"])
    assert ours.std() > 0.3  # the comparison means something
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_continuations_with_cache_and_padding_are_ours(exports: Exports, name: str) -> None:
    loaded, answer = exports.loaded[name], exports.answers[name]
    prompt = TOKENS_BS[0, 5:].tolist()
    ours = generate(loaded.model, prompt, max_new_tokens=NEW, routing=loaded.routing)
    assert answer["single"] == ours
    assert answer["padded"][: len(ours)] == ours


@pytest.mark.parametrize("name", SETTINGS)
def test_classes_dtypes_and_ids(exports: Exports, name: str) -> None:
    answer, tokenizer = exports.answers[name], exports.loaded[name].tokenizer
    assert answer["class"] == ("ReleasedMoEPPForCausalLM" if LAYOUTS[name] == "released" else "MoEPPForCausalLM")
    assert answer["dtypes"] == ["torch.float32"]
    assert answer["ids"] == [ids_N.tolist() for ids_N in tokenizer.encode_batch(TEXTS)]
    assert answer["eos"] == [tokenizer.eos_id] * 3


def test_bf16_weights_are_rounded_and_biases_are_not(exports: Exports) -> None:
    loaded, folder = exports.loaded["controller"], HFFolder(exports.folders["paper_bf16"])
    assert exports.answers["paper_bf16"]["dtypes"] == ["torch.bfloat16", "torch.float32"]
    biases = bias_names(loaded.recipe.model)
    assert {name for name, dtype in folder.dtypes.items() if dtype == torch.float32} == set(biases)
    assert loaded.bias_LE is not None
    assert torch.equal(torch.stack([folder.read(name) for name in biases]), loaded.bias_LE)
    head = dict(loaded.model.named_parameters())["head.weight"]
    assert torch.equal(folder.read("lm_head.weight"), head.to(torch.bfloat16))
    theirs, ours = torch.tensor(exports.answers["paper_bf16"]["logits"]), logits(loaded, TOKENS_BS)
    assert (theirs - ours).abs().mean() < 0.05 * ours.std()


@pytest.mark.parametrize("name", ["released", "dense_between", "shared", "controller"])
def test_a_folder_holds_just_the_model(exports: Exports, name: str) -> None:
    folder, run = HFFolder(exports.folders[name]), exports.folders[name].parent.parent / "runs" / name
    model, weights = exports.loaded[name].recipe.model, stored(run)
    expected: dict[str, Tensor] = {}
    for part in parts(model):
        expected |= part.to_hf(weights[part.parameter][part.start : part.stop])
    unused = {"model.layers.0.mlp.moe.gate.gate_map.weight"} if name == "released" else set()
    assert folder.shapes.keys() == expected.keys() | unused | set(bias_names(model))
    assert all(torch.equal(folder.read(key), tensor) for key, tensor in expected.items())
    assert all(not folder.read(key).any() for key in unused)


def test_files_of_a_folder(exports: Exports) -> None:
    folder = exports.folders["per_head_norm"]
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "configuration_moepp.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_moepp.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 2, "pad_token_id": 2}
    assert (folder / "tokenizer.model").read_bytes() == (GOLDEN_SHARDS / "tokenizer" / "tokenizer.model").read_bytes()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\nlicense: #" in card
    for said in ("document_attention: true", "0 of 20 updates, 0 tokens", "trust_remote_code=True", "stopped at the"):
        assert said in card
    assert "path: shards\n" in card and str(ROOT) not in card  # a published card names no folder of this machine


def test_the_card_says_where_the_weights_came_from(tmp_path: Path) -> None:
    recipe = golden_recipe()
    pieces = [(name, 0, tensor) for name, tensor in initial_model(recipe).named_parameters()]
    source = {"folder": "/somewhere/olmoe", "model_type": "olmoe", "config_sha256": "0"}
    write_start(tmp_path / "run", recipe, pieces, origin={"program": "upcycle", "from": [source]})
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert "started from other weights: upcycle of olmoe (olmoe)\n" in (tmp_path / "out" / "README.md").read_text()


def test_rows_without_a_token_are_never_generated(tmp_path: Path) -> None:
    start_run(tmp_path / "run", "model.vocab_size=515")  # the tokenizer has 512 ids
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [512, 513, 514]


def test_the_released_layout_is_refused_with_what_differs(tmp_path: Path) -> None:
    start(tmp_path / "run", "dense_between")
    with pytest.raises(RecipeError, match="cannot say this model.*\n  model.moe.every: 2 here, 1 there\n"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", layout="released")
    assert not (tmp_path / "out").exists()


def test_what_the_released_layout_does_not_hold_is_told(tmp_path: Path) -> None:
    settings = ["model.moe.variant=released", "model.document_attention=true", "model.moe.tau=0.5"]
    start_run(tmp_path / "run", *settings)
    done = export_checkpoint(tmp_path / "run", tmp_path / "out")
    told = "an import needs them in its recipe: model.document_attention: True, model.moe.tau: 0.5"
    assert done.layout == "released" and done.notices[-1].endswith(told)


def test_our_layout_for_a_released_model_and_small_shards(tmp_path: Path) -> None:
    start(tmp_path / "run", "released")
    done = export_checkpoint(tmp_path / "run", tmp_path / "out", layout="moepp", max_shard_bytes=50_000)
    assert (done.layout, done.notices) == ("moepp", [])
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert "model.layers.0.mlp.moe.gate.gate_map.weight" not in HFFolder(tmp_path / "out").shapes


def test_a_threshold_may_be_lowered_and_a_parameter_not(tmp_path: Path) -> None:
    start(tmp_path / "run", "threshold")
    export_checkpoint(tmp_path / "run", tmp_path / "out", overrides=["model.moe.router.threshold=0.3"])
    assert HFFolder(tmp_path / "out").config["moe"]["router"]["threshold"] == 0.3
    with pytest.raises(RecipeError, match="is another model than its weights"):
        export_checkpoint(tmp_path / "run", tmp_path / "other", overrides=["model.num_layers=2"])


def test_an_existing_folder_stays(tmp_path: Path) -> None:
    start(tmp_path / "run", "paper")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FolderError, match="exists and is not empty"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path / "run", "released")
    out = str(tmp_path / "out")
    options = ["--dtype", "bfloat16", "--max-shard-size", "60KB"]
    assert moepp(monkeypatch, "export", str(tmp_path / "run"), out, *options) == 0
    said = capsys.readouterr()
    assert "in the released layout; fill in the license" in said.out
    assert "gate_map.weight is zeros" in said.err
    assert HFFolder(tmp_path / "out").config["dtype"] == "bfloat16"
    assert moepp(monkeypatch, "export", str(tmp_path / "run"), out) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert moepp(monkeypatch, "export", str(tmp_path / "run"), out + "2", "--max-shard-size", "many") == 1
    assert "'many' is no size" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("1.5 K", 1500), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5GiB", "0"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(RecipeError, match="write it as 5GB or 500MB"):
        parse_size(text)


def test_the_card_tells_the_stages_that_were_reached_and_no_place_of_raw_files() -> None:
    recipe = load_recipe(
        "tests/golden/golden.yaml",
        [
            "data.mixture=null",
            "data.stages=[{mixture: {dolma: 1}, tokens: 640}, {mixture: {pile: 1}}]",
            "data.mode=stream",
            "data.raw={dolma: /of/a/machine/dolma, tokenizer: /of/a/machine/t.model}",
        ],
    )
    assert "/of/a/machine" not in _without_places(recipe).dump()
    order = {"stages": [[0, {"dolma": 10_000}], [10, {"pile": 2_500, "dolma": 7_500}], [99, {"pile": 10_000}]]}
    lines = _training(recipe, {"step": 4, "data": {"order": order, "rows": 64}})
    assert "tokens were drawn from dolma 100 %; from row 10 on pile 25 %, dolma 75 %" in lines
