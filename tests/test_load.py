"""A trained model in one process: found, checked, put together, and what may be set anew."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from damage import Bomb, set_index
from loaded_models import GOLDEN_SHARDS, golden_recipe, initial_model, known_model, moepp, start_run

from data_pipeline.document import DataError
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.config import RecipeError
from moepp_ds.hf_export import export_checkpoint
from moepp_ds.load import choose_folder, find_tokenizer, load_model, with_overrides

ROWS = torch.tensor([[5, 9, 300, 2, 8, 44, 17]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder by the golden recipe, weights spread wide."""
    path = tmp_path_factory.mktemp("runs") / "golden"
    start_run(path, std=0.3)
    return path


def copied(run: Path, tmp_path: Path) -> Path:
    """The run's checkpoint, to be damaged."""
    return Path(shutil.copytree(run / "checkpoints/step-00000000", tmp_path / "copy"))


def test_the_model_is_the_one_that_was_saved(run: Path) -> None:
    loaded = load_model(run, device="cpu")
    expected = initial_model(golden_recipe(), std=0.3)
    assert not loaded.model.training and not any(weight.requires_grad for weight in loaded.model.parameters())
    assert [n for n, _ in loaded.model.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert all(torch.equal(p, loaded.model.get_parameter(n)) for n, p in expected.named_parameters())
    with torch.no_grad():
        assert torch.equal(loaded.model.token_losses(ROWS), expected.eval().token_losses(ROWS))
    assert loaded.recipe == golden_recipe()
    assert (loaded.index["step"], loaded.bias_LE, loaded.device) == (0, None, torch.device("cpu"))
    assert loaded.tokenizer.eos_id == loaded.model.eos_id == 2
    assert loaded.tokenizer.vocab_size == 512


def test_every_name_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints/step-00000000"
    assert [choose_folder(path) for path in (folder, run, run / "checkpoints")] == [folder] * 3
    with pytest.raises(CheckpointError, match="nosuch does not exist; name a checkpoint's folder, or a run's such as"):
        choose_folder(tmp_path / "nosuch")
    for path in (tmp_path, run / "recipe.yaml"):
        with pytest.raises(CheckpointError, match="is no checkpoint: it holds no index.json, and neither it nor"):
            choose_folder(path)


def test_a_newer_checkpoint_that_is_passed_over_is_warned_of(run: Path, tmp_path: Path) -> None:
    """Found as a resume finds it, without `latest` too."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    folder, cut_off = copy / "checkpoints/step-00000000", copy / "checkpoints/step-00000010"
    (copy / "checkpoints/latest").unlink()
    assert choose_folder(copy) == folder
    cut_off.mkdir()
    with pytest.warns(UserWarning, match="a newer checkpoint is passed over: .*step-00000010 holds no index.json"):
        assert choose_folder(copy) == folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(run: Path, dtype: torch.dtype) -> None:
    loaded = load_model(run, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    with torch.no_grad():
        close = initial_model(golden_recipe(), std=0.3).eval().token_losses(ROWS)
        found = loaded.model.token_losses(ROWS)
    torch.testing.assert_close(found.float(), close, rtol=0.1 if dtype == torch.bfloat16 else 1e-4, atol=0)


def test_what_changes_no_shape_may_be_set(run: Path) -> None:
    loaded = load_model(run, ["model.moe.top_k=3", "evaluation.rows=9"], device="cpu")
    assert (loaded.recipe.model.moe.top_k, loaded.recipe.evaluation.rows) == (3, 9)
    other = with_overrides(loaded, ["model.moe.top_k=1"])
    assert (other.recipe.model.moe.top_k, other.recipe.evaluation.rows) == (1, 4)  # not on top of the first ones
    assert other.model.head.weight.data_ptr() == loaded.model.head.weight.data_ptr()  # not copied
    with torch.no_grad():
        for model, choices in ((loaded, 3), (other, 1)):
            _, layers = model.model.hidden(ROWS, model.routing)
            assert [int(layer.statistics.wanted_E.sum()) for layer in layers] == [7 * choices] * 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=64", "is another model than its weights; set only what changes no parameter:\n  blocks.0"),
        ("model.moe.gating_residual=false", r"blocks.1.moe.router.residual_EE: checkpoint \[8, 8\], model lacks it"),
        ("model.moe.topk=3", r"unknown key; did you mean model.moe.top_k\? \(from --set model.moe.topk=3\)"),
        ("model.moe.router.threshold=0.5", "top_k 2 is given beside router.threshold 0.5"),
        ("nothing", "write it as section.key=value"),
        ("model.vocab_size=500", "is another model than its weights"),
    ],
)
def test_what_may_not_be_set(run: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_model(run, [override], device="cpu")
    with pytest.raises(RecipeError, match=message):
        with_overrides(load_model(run, device="cpu"), [override])


CONTROLLED = ("model.moe.controller.rate=0.1",)


def test_biases_of_the_controller(tmp_path: Path) -> None:
    """Those of the checkpoint where it has some, zeros before the first update, none where there is no controller."""
    run = tmp_path / "run"
    start_run(run, *CONTROLLED)
    fresh = load_model(run, device="cpu").bias_LE
    assert fresh is not None and torch.equal(fresh, torch.zeros(3, 8))
    bias_LE = [[0.1 * layer + 0.01 * expert for expert in range(8)] for layer in range(3)]
    routing = {"bias_LE": bias_LE, "share_LE": None}
    set_index(run / "checkpoints/step-00000000", lambda index: index.update(routing=routing))
    loaded = load_model(run, device="cpu")
    assert loaded.bias_LE is not None and torch.equal(loaded.bias_LE, torch.tensor(bias_LE))
    assert loaded.routing.bias_LE is loaded.bias_LE
    assert with_overrides(loaded, ["model.moe.controller=null"]).bias_LE is None


def test_tokenizers(run: Path, tmp_path: Path) -> None:
    own = GOLDEN_SHARDS / "tokenizer/tokenizer.model"
    nowhere = f"data.path={tmp_path}"
    with pytest.raises(DataError, match=r"holds no shard set: .*\n.*or name the tokenizer with --tokenizer FILE"):
        load_model(run, [nowhere], device="cpu")
    assert load_model(run, [nowhere], device="cpu", tokenizer=own).tokenizer.vocab_size == 512
    with pytest.raises(DataError, match="cannot read the tokenizer .*nosuch"):
        load_model(run, device="cpu", tokenizer=tmp_path / "nosuch")
    folder = copied(run, tmp_path)
    set_index(folder, lambda index: index.update(data={"order": {"tokenizer": "f" * 64}}))
    with pytest.raises(DataError, match=r"is not the one that the checkpoint names \(ffffffffffff\.\.\.\); set"):
        load_model(folder, device="cpu")
    loaded = load_model(folder, device="cpu", tokenizer=own)
    file, found = find_tokenizer(loaded.recipe, {})
    assert (file, found.fingerprint) == (own, loaded.tokenizer.fingerprint)
    other = Path(shutil.copy(own, tmp_path / "other.model"))
    assert find_tokenizer(loaded.recipe, loaded.index, other)[0] == other


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    start_run(tmp_path / "run", "model.vocab_size=300")
    with pytest.raises(DataError, match=r"has 512 ids, and the model 300 \(model.vocab_size\); name the model's own"):
        load_model(tmp_path / "run", device="cpu")


BAD_RECIPES: list[tuple[Callable[[dict], object], str]] = [
    (lambda index: index.pop("recipe"), "it is None and no mapping of sections"),
    (lambda index: index["recipe"].pop("train"), "train: is required and not given"),
    (lambda index: index["recipe"]["model"].update(num_layers=4), "is another model than its weights"),
    (lambda index: index["recipe"]["model"].update(num_layers=10**12), "has 1000000000000 layers, and its"),
    (lambda index: index["recipe"]["model"].update(from_the_future=1), "model.from_the_future: unknown key"),
]


@pytest.mark.parametrize(("change", "message"), BAD_RECIPES)
def test_a_stored_recipe_that_is_not_the_weights(
    run: Path, tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    folder = copied(run, tmp_path)
    set_index(folder, change)
    with pytest.raises(RecipeError, match=message):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"routing": {"bias_LE": [[0.0] * 8] * 2, "share_LE": None}}, "3 MoE layers of 8 experts"),
        ({"routing": {"bias_LE": [[float("nan")] * 8] * 3, "share_LE": None}}, "routing.bias_LE.0.0: Input should be"),
        ({"routing": "none"}, "no index of a checkpoint: routing: Input should be"),
        ({"routing": {}}, "no index of a checkpoint: routing.bias_LE: Field required"),
        ({"data": {"order": None}}, "no index of a checkpoint: data.order: Input should be"),
        ({"tokens": "many"}, "no index of a checkpoint: tokens: Input should be"),
        ({"versions": [1]}, "no index of a checkpoint: versions: Input should be"),
    ],
)
def test_facts_that_are_none(tmp_path: Path, facts: dict, message: str) -> None:
    """Neither looked at nor exported."""
    start_run(tmp_path / "run", *CONTROLLED)
    set_index(tmp_path / "run/checkpoints/step-00000000", lambda index: index.update(facts))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "run", device="cpu")
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts() -> None:
    loaded = known_model()
    assert loaded.encode("3 4 5") == [3, 4, 5]
    assert len(loaded.encode("3 " * 64)) == 64
    for text in ("", "  "):
        with pytest.raises(DataError, match="the text is empty: it has no token; give some words"):
            loaded.encode(text)
    with pytest.raises(DataError, match="the text is not UTF-8: surrogates not allowed at character 2; give plain"):
        loaded.encode(os.fsdecode(b"3 \xff"))  # as Python hands on what a shell gives
    with pytest.raises(DataError, match=r"65 tokens, and .* rows of 64 \(data.seq_len\); shorten it, or allow more"):
        loaded.encode("3 " * 65)


def test_no_pickle_of_a_run_folder_is_executed(run: Path, tmp_path: Path) -> None:
    """Wherever it lies, it is refused as damage or never read."""
    exploded, copy = tmp_path / "exploded", tmp_path / "run"
    bomb = pickle.dumps(Bomb(exploded))
    shutil.copytree(run, copy)
    files = [path for path in copy.rglob("*") if path.is_file()]
    for file in [*files, copy / "optimizer.pt", copy / "checkpoints/step-00000000/model.bin"]:
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(bomb)
        try:
            load_model(copy, device="cpu")
            assert file.name not in ("index.json", "part-00000.safetensors")
        except CheckpointError:
            assert file.name in ("index.json", "part-00000.safetensors")
        file.write_bytes(before)
    bad_tokenizer = tmp_path / "tokenizer.model"
    bad_tokenizer.write_bytes(bomb)
    with pytest.raises(DataError, match="neither a SentencePiece model nor"):
        load_model(run, device="cpu", tokenizer=bad_tokenizer)
    assert not exploded.exists()
    pickle.loads(bomb)  # it is a bomb
    assert exploded.exists()


def test_the_commands_say_what_is_wrong(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message and exit code 1, whatever cannot be loaded."""
    for command in (["evaluate"], ["generate", "--prompt", "x"], ["trace", "--text", "x", "--checkpoint"]):
        for arguments, message in (
            ([str(tmp_path)], f"error: {tmp_path} is no checkpoint"),
            ([str(run), "--set", "model.moe.topk=3"], "did you mean model.moe.top_k?"),
            ([str(run), "--tokenizer", str(ROOT / "nosuch")], "error: cannot read the tokenizer"),
        ):
            assert moepp(monkeypatch, *command, *arguments) == 1
            said = capsys.readouterr().err
            assert said.startswith("error: ") and message in said and "Traceback" not in said
