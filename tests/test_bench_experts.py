"""The measurement of the experts: routing in exact balance, turns that are taken, a report. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from loaded_models import start_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from run_folders import drawn
from typer.testing import CliRunner

from moepp_ds.__main__ import app
from moepp_ds.bench.cases import random_layer
from moepp_ds.bench.experts import ExpertsResult, Row, bench_experts, experts_case
from moepp_ds.bench.plot import draw
from moepp_ds.bench.presets import PRESETS, LayerSizes
from moepp_ds.bench.routes import balanced_counts, forced_routes, ideal_speedup
from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.kinds import ExpertKinds
from moepp_ds.moe_layer import LayerSettings
from moepp_ds.router import RouterSettings
from moepp_ds.timing import WARM_UP, ratio, take_turns

KINDS = ExpertKinds(num_ffn=8, num_constant=2, num_copy=1, num_zero=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_recipes_sizes(preset: str) -> None:
    model = load_recipe(ROOT / f"launch/recipes/moepp_{preset}.yaml", []).model
    moe = model.moe
    kinds = ExpertKinds(moe.num_ffn_experts, moe.num_constant, moe.num_copy, moe.num_zero)
    width = moe.expert_ffn_hidden_size or model.ffn_hidden_size
    assert moe.top_k is not None
    assert PRESETS[preset] == LayerSizes(model.hidden_size, width, kinds, moe.top_k)


def test_the_ideal_is_the_papers() -> None:
    ideal = [round(ideal_speedup(KINDS, tau), 2) for tau in (1.0, 0.75, 0.5, 0.25, 0.1)]
    assert ideal == [1.50, 1.67, 2.0, 3.0, 6.0]


@pytest.mark.parametrize(
    ("kinds", "tau", "assignments", "counts"),
    [
        (KINDS, 1.0, 120, [10] * 12),
        (KINDS, 0.25, 120, [5] * 8 + [20] * 4),
        (KINDS, 0.75, 100, [7, 8, 7, 8, 7, 8, 7, 8, 10, 10, 10, 10]),
        (ExpertKinds(3, 0, 0, 0), 1.0, 8, [2, 3, 3]),
    ],
)
def test_counts_are_in_balance(kinds: ExpertKinds, tau: float, assignments: int, counts: list[int]) -> None:
    assert balanced_counts(kinds, tau, assignments) == counts


def test_routes_have_these_counts_and_no_token_meets_an_expert_twice() -> None:
    routes = forced_routes(KINDS, tau=0.25, tokens=60, top_k=2, device=torch.device("cpu"))
    assert routes.plan.kept_E.tolist() == [5] * 8 + [20] * 4 and routes.plan.ffn_counts == (5,) * 8
    assert routes.token_N.tolist() == [token for token in range(60) for _ in range(2)]
    assert (routes.expert_N[0::2] != routes.expert_N[1::2]).all()
    other = forced_routes(KINDS, tau=0.25, tokens=60, top_k=2, device=torch.device("cpu"), seed=1)
    assert other.expert_N.tolist() != routes.expert_N.tolist()


def test_a_balance_that_cannot_be_is_refused() -> None:
    kinds = ExpertKinds(num_ffn=8, num_constant=0, num_copy=0, num_zero=1)
    with pytest.raises(ValueError, match="tau 0.1 gives one expert 111 of 100 tokens: .* use a larger tau"):
        forced_routes(kinds, tau=0.1, tokens=100, top_k=2, device=torch.device("cpu"))


def test_actions_take_turns() -> None:
    turns: list[str] = []
    seconds = take_turns({name: lambda name=name: turns.append(name) for name in "ab"}, repeats=3)  # type: ignore[misc]
    assert "".join(turns) == ("abba" * (WARM_UP + 3))[: 2 * (WARM_UP + 3)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    # rounds say 1, 2 and 10; the medians alone would say 10 / 2
    assert ratio({"a": [1.0, 10.0, 20.0], "b": [1.0, 5.0, 2.0]}, "a", "b") == 2.0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tau_is_measured(device: str, dtype: torch.dtype) -> None:
    sizes = LayerSizes(16, 32, KINDS)
    result = bench_experts(sizes, [1.0, 0.5], tokens=64, dtype=dtype, device=torch.device(device), repeats=2)
    assert [(row.tau, row.ideal) for row in result.rows] == [(1.0, 1.5), (0.5, 2.0)]
    assert all(row.measured > 0 and row.measured_backward > 0 for row in result.rows)
    for times in result.seconds.values():
        assert set(times) == {"vanilla", "1", "0.5"}
        assert all(len(found) == 2 for found in times.values())


def test_everything_behind_the_router_has_a_gradient() -> None:
    shared = {"shared_ffn_hidden_size": 8, "shared_expert_gate": True}
    settings = LayerSettings(RouterSettings(top_k=2), tau=1.0, seats=None, **shared)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    layer = random_layer(LayerSizes(16, 32, KINDS), KINDS, settings, dtype=torch.float32, device=cpu)
    routes = forced_routes(KINDS, tau=1.0, tokens=8, top_k=2, device=cpu)
    case = experts_case(layer, routes, torch.ones(8, 16))
    case.forward_backward()
    assert len(case.wanted) == 2 + len(list(layer.parameters())) - len(list(layer.router.parameters()))
    assert any(wanted is layer.shared_gate_D for wanted in case.wanted)


def test_a_title_stays_within_its_picture() -> None:
    told = {"device": "a processor of which its maker has much to say", "threads": 2, "torch": "2.13.0+cpu"}
    figure = draw(ExpertsResult(told, [Row(1.0, 1.5, 1.4, 1.3), Row(0.1, 6.0, 5.0, 4.0)], {}))
    FigureCanvasAgg(figure).draw()
    (title,) = figure.texts
    extent, whole = title.get_window_extent(), figure.bbox
    assert whole.x0 <= extent.x0 and extent.x1 <= whole.x1 and extent.y1 <= whole.y1


def test_command(tmp_path: Path) -> None:
    options = ["--tokens", "16", "--repeats", "1", "--taus", "0.5", "--dtype", "bf16", "--device", "cpu"]
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.svg")]
    done = CliRunner().invoke(app, ["bench", "experts", *options, *files])
    assert done.exit_code == 0, done.output
    assert {"tau", "0.5", "ideal", "forward", "forward + backward"} <= drawn(tmp_path / "found.svg")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["preset"], found["tokens"], found["dtype"], found["repeats"]) == ("0.6b", 16, "bf16", 1)
    assert set(found["rows"][0]) == {"tau", "ideal", "measured", "measured_backward"}
    assert "of ideal" in done.output
    for place, words in [("found.txt", "ends in .png, .svg or .pdf"), ("no/found.png", "in a folder that exists")]:
        done = CliRunner().invoke(app, ["bench", "experts", *options, "--plot", str(tmp_path / place)])
        assert isinstance(done.exception, RecipeError) and words in str(done.exception)
    for taus in ("0", "2", "x", "0.5,0.50"):
        assert CliRunner().invoke(app, ["bench", "experts", *options, "--taus", taus]).exit_code == 2


def test_a_trained_model_is_measured_by_its_own_routing(tmp_path: Path) -> None:
    """Of the golden recipe's model, at its start: 2 held-out rows of 64 tokens, 3 MoE layers, 2 choices a token."""
    start_run(tmp_path / "run", std=0.3)
    options = ["--rows", "2", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    picture = ["--plot", str(tmp_path / "found.svg")]
    done = CliRunner().invoke(app, ["bench", "trained", str(tmp_path / "run"), *options, *picture])
    assert done.exit_code == 0, done.output
    assert {"MoE layer", "ideal"} <= drawn(tmp_path / "found.svg")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == 128 and [row["layer"] for row in found["rows"]] == [0, 1, 2]
    for row in found["rows"]:
        assert 0 < row["ffn_share"] < 1 and row["ideal"] == pytest.approx(1 / row["ffn_share"])
        assert 1 <= row["fullest"] <= 4 and row["measured"] > 0 and row["measured_backward"] > 0
