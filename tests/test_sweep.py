"""Loss against operations: every product is counted, as it happens, and several values of a key make a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import GOLDEN_SHARDS, golden_recipe, moepp, start_run
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.document import DataError
from data_pipeline.stream import open_held_out
from moepp_ds.config import RecipeError
from moepp_ds.evaluate import evaluate, overall
from moepp_ds.load import LoadedModel, load_model, with_overrides
from moepp_ds.sweep import Sweep, as_json, flop_counter, measure, parse_sweep, print_sweep, sweep

THRESHOLD = ("model.moe.router.threshold=1.0", "model.moe.dropless=true")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two run folders by the golden recipe: top_k and threshold routers."""
    folder = tmp_path_factory.mktemp("runs")
    start_run(folder / "top_k", std=0.3)
    start_run(folder / "threshold", *THRESHOLD, std=0.3)
    return folder


def loaded(runs: Path, name: str = "top_k", *overrides: str) -> LoadedModel:
    return load_model(runs / name, overrides, device="cpu")


ONE_SETTING = Sweep(("a.b=1", "c=2"), None, ())
OVERRIDES: list[tuple[list[str], Sweep]] = [
    ([], Sweep((), None, ())),
    (["a.b=1", "c=2"], ONE_SETTING),
    (["a.b=1,0.5, 2", "c=2"], Sweep(("c=2",), "a.b", ("1", "0.5", "2"))),
    (["c=2", " a.b = x,y"], Sweep(("c=2",), "a.b", ("x", "y"))),
    (["data.mixture={a: 1, b: 2}", "d=[1, 2]"], Sweep(("data.mixture={a: 1, b: 2}", "d=[1, 2]"), None, ())),
    (["e='1,2'", 'f= "1,2"'], Sweep(("e='1,2'", 'f= "1,2"'), None, ())),
    (["nonsense"], Sweep(("nonsense",), None, ())),  # refused where overrides are read
]


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES)
def test_which_override_is_swept(overrides: list[str], expected: Sweep) -> None:
    assert parse_sweep(overrides) == expected


def test_settings_of_a_sweep() -> None:
    assert ONE_SETTING.settings() == [(None, ["a.b=1", "c=2"])]
    assert Sweep(("c=2",), "a.b", ("1", "2")).settings() == [("1", ["c=2", "a.b=1"]), ("2", ["c=2", "a.b=2"])]


def test_overrides_that_are_no_sweep() -> None:
    with pytest.raises(RecipeError, match="a.b and c have several values each; sweep one key at a time"):
        parse_sweep(["a.b=1,2", "c=3,4"])
    for text in ("1,", ",1", "1,,2", ","):
        with pytest.raises(RecipeError, match="no value beside one of the commas; write KEY=V1,V2,V3"):
            parse_sweep([f"a.b={text}"])


class _Seen(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


PRODUCTS = set(
    "mm addmm bmm baddbmm addbmm mv addmv dot vdot ger outer addr matmul linear bilinear gemm einsum tensordot "
    "attention convolution conv1d conv2d".split()
)
"""Words in the names of operators that multiply matrices."""


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.document_attention=true", "model.num_kv_heads=1", "model.qk_norm=per_head", "model.qkv_bias=true"],
        ["model.moe.router.num_layers=2", "model.moe.num_shared_experts=2", "model.moe.shared_expert_gate=true"],
        [*THRESHOLD, "model.moe.every=2", "model.moe.combine=renormalize_computing", "model.moe.router.logit_std=1.0"],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_product_is_counted(tmp_path: Path, settings: list[str], dtype: torch.dtype) -> None:
    """Of what runs, no operator is called like a product that the counter does not know."""
    start_run(tmp_path / "run", *settings, std=0.3)
    model = load_model(tmp_path / "run", device="cpu", dtype=dtype).model
    with torch.no_grad(), _Seen() as seen:
        model.token_losses(torch.arange(65)[None])
    counted = {str(packet).removeprefix("aten.").replace(".", "::") for packet in flop_counter().flop_registry}
    products = {name for name in seen.names if PRODUCTS & set(name.split("_"))}
    assert {"mm", "_scaled_dot_product_flash_attention_for_cpu"} <= products <= counted


def test_operations_by_hand(runs: Path) -> None:
    """D 32, S 64, F 48, V 512, 8 experts of which 4 FFN and 2 constant, 3 layers, residuals in two of them."""
    found = measure(loaded(runs))
    attention = 2 * 4 * 32 * 32 + 2 * 2 * 64 * 32  # four projections; scores and values over all positions
    router = 2 * 8 * 32
    constants = 2 * 2 * 32 + 2 * 2 * 32  # of the selectors [2, 2, D] their difference, values [2, D]
    experts = found.ffn_experts * 6 * 32 * 48
    everything = 3 * (attention + router + constants + experts) + 2 * 2 * 8 * 8 + 2 * 32 * 512
    assert found.flops == pytest.approx(everything, rel=1e-12)
    assert found.ffn_expert_flops == pytest.approx(3 * experts, rel=1e-12)


def test_grouped_products_are_counted_like_slices() -> None:
    """The kernel of GPUs, which a CPU runs too."""
    rows_RX, weight_EXO = torch.randn(12, 16), torch.randn(3, 16, 8)
    ends_E = torch.tensor([5, 5, 12], dtype=torch.int32)
    with flop_counter() as counter:
        torch.nn.functional.grouped_mm(rows_RX, weight_EXO, offs=ends_E)
    assert counter.get_total_flops() == 2 * 12 * 16 * 8


def test_scores_are_those_of_training(runs: Path) -> None:
    """And counting changes nothing."""
    model = loaded(runs)
    found = measure(model)
    recipe, held_out = golden_recipe(), open_held_out(golden_recipe().data)
    scores = evaluate(model.model, held_out, seq_len=64, micro_batch_size=4, rows=recipe.evaluation.rows)
    assert (found.sources, found.overall, found.value) == (scores, overall(scores, held_out), None)
    fewer = measure(model, rows=1)
    assert fewer.overall.tokens == sum(score.tokens for score in fewer.sources.values()) < found.overall.tokens
    assert {source: score.tokens for source, score in fewer.sources.items()} == dict.fromkeys(scores, 64)


def test_ffn_experts_are_those_that_computed(runs: Path) -> None:
    """Against the routing of the same rows, worked out here."""
    model = loaded(runs)
    kept, tokens = 0, 0
    for texts in open_held_out(model.recipe.data).values():
        rows = torch.from_numpy(texts.rows(64, 4)[0])
        for row in rows:
            _, layers = model.model.hidden(row[None, :-1])
            kept += sum(int((layer.routing.expert_N < 4).sum()) for layer in layers)
            tokens += 64
    assert measure(model).ffn_experts == kept / (3 * tokens)


def test_lower_thresholds_compute_less(runs: Path) -> None:
    """Operations in FFN experts are proportional to the choices of FFN experts, and all else stays."""
    model = loaded(runs, "threshold")
    plan = parse_sweep(["model.moe.router.threshold=1.0,0.9,0.5,0.0"])
    points = sweep(model, plan)
    assert [point.value for point in points] == ["1.0", "0.9", "0.5", "0.0"]
    assert points[0].ffn_experts == 4 and points[3].ffn_experts < 1  # all of them; one expert of any kind
    for before, after in zip(points, points[1:]):
        assert after.flops < before.flops and after.ffn_experts < before.ffn_experts
        assert before.flops - after.flops == pytest.approx(before.ffn_expert_flops - after.ffn_expert_flops, rel=1e-9)
    for point in points:
        assert point.ffn_expert_flops == pytest.approx(3 * 6 * 32 * 48 * point.ffn_experts, rel=1e-9)
    assert len({point.overall.loss for point in points}) == 4
    again = measure(loaded(runs, "threshold", "model.moe.router.threshold=0.5"), "0.5")
    assert again == points[2]


def test_a_value_that_is_refused_is_found_before_anything_is_measured(runs: Path) -> None:
    model, measured = loaded(runs), []
    model.model.register_forward_pre_hook(lambda *_: measured.append(1))
    with pytest.raises(RecipeError, match="top_k 99 is more than the 8 experts"):
        sweep(model, parse_sweep(["model.moe.top_k=1,99"]))
    with pytest.raises(RecipeError, match="another model than its weights"):
        sweep(model, parse_sweep(["model.hidden_size=32,64"]))
    assert not measured


def test_biases_of_the_controller_count(tmp_path: Path) -> None:
    start_run(tmp_path / "run", "model.moe.controller.rate=0.1", std=0.3)
    model = loaded(tmp_path, "run")
    everyone_copies = torch.zeros(3, 8).index_fill_(1, torch.tensor([6, 7]), 9.0)
    assert measure(LoadedModel(**{**vars(model), "bias_LE": everyone_copies})).ffn_experts == 0
    assert measure(model).ffn_experts > 0


def test_shards_without_held_out_text(runs: Path, tmp_path: Path) -> None:
    from shard_sets import write_set

    train = {"made": {"a": [[3, 4, 5]]}}
    other = write_set(tmp_path / "shards", train, vocab_size=512)
    model = with_overrides(loaded(runs), [f"data.path={other}", "data.mixture={made: 1}"])
    with pytest.raises(DataError, match="no text was held out of the shards at .*; build them with moepp-data build"):
        measure(model)


def test_the_table(runs: Path) -> None:
    plan = parse_sweep(["model.moe.top_k=1,2"])
    points = sweep(loaded(runs), plan, rows=1)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_sweep(plan, points, console, sources=True)
    text = console.export_text()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    first, second = points
    assert rows[1] == [
        "2",
        f"{second.overall.loss:.4f}",
        f"{second.overall.bits_per_byte:.4f}",
        f"{second.ffn_experts:.3f}",
        f"{second.flops / 1e6:.3f}",
        f"{second.ffn_expert_flops / 1e6:.3f}",
        f"{second.flops / first.flops:.1%}",
    ]
    assert rows[0][0] == "1" and rows[0][-1] == "100.0%"
    assert [row[:2] for row in rows[2:]] == [[source, value] for source in first.sources for value in ("1", "2")]
    assert text.startswith(f"held-out text, {first.overall.tokens:,} tokens scored; FFN experts and MFLOP are per")
    assert "top_k" in text
    content = json.loads(json.dumps(as_json(loaded(runs), plan, points)))
    assert (content["swept"], content["set"], content["step"]) == ("model.moe.top_k", [], 0)
    assert [point["value"] for point in content["points"]] == ["1", "2"]
    assert content["points"][1]["overall"]["loss"] == second.overall.loss


def test_the_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.json"
    asked = ["evaluate", str(runs / "threshold"), "--rows", "1", "--json", str(file)]
    assert moepp(monkeypatch, *asked, "--set", "model.moe.router.threshold=1.0,0.5") == 0
    said = capsys.readouterr().out
    assert "threshold" in said and "redpajama/book" not in said
    points = json.loads(file.read_text())["points"]
    assert [point["value"] for point in points] == ["1.0", "0.5"]
    assert points[0]["flops"] > points[1]["flops"] and "redpajama/book" in points[0]["sources"]
    assert moepp(monkeypatch, *asked, "--sources", "--set", f"data.path={GOLDEN_SHARDS}") == 0
    said = capsys.readouterr().out
    assert "redpajama/book" in said and "threshold" not in said and "…" not in said
    assert json.loads(file.read_text())["swept"] is None
    for arguments, message in (
        (["--set", "data.seed=1,2", "--set", "train.seed=1,2"], "error: data.seed and train.seed have several values"),
        (["--set", "model.moe.router.threshold=0.5,2"], "threshold"),
        (["--set", f"data.path={tmp_path}"], "holds no shard set"),
        (["--json", str(tmp_path / "no/such.json")], "cannot be written: name a file in a folder that exists"),
    ):
        assert moepp(monkeypatch, *asked, *arguments) == 1
        assert message in capsys.readouterr().err
