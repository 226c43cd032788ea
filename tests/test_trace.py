"""Where tokens went: choices, weights, drops and counts typed out from a router whose every score is known."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from loaded_models import known_model, moepp, start_run
from rich.console import Console

from data_pipeline.document import DataError
from data_pipeline.tokenizer import load_tokenizer
from moepp_ds.config import RecipeError
from moepp_ds.kinds import ExpertKinds
from moepp_ds.load import LoadedModel, load_model
from moepp_ds.trace import Choice, Trace, as_json, expert_names, print_trace, token_pieces, trace_text

SCORES: dict[int, list[float]] = {
    2: [0.50, 0.30, 0.10, 0.05, 0.03, 0.02],
    3: [0.60, 0.05, 0.05, 0.02, 0.25, 0.03],
    4: [0.05, 0.05, 0.02, 0.45, 0.03, 0.40],
    5: [0.10, 0.35, 0.05, 0.04, 0.02, 0.44],
}
"""What the router says of tokens 2 to 5: probabilities of ffn 0, 1, 2, constant 0, copy, zero."""

ENTROPY = -sum(p * math.log(p) for row in SCORES.values() for p in row) / len(SCORES)

CHOSEN = [
    [("ffn 0", 0.50), ("ffn 1", 0.30)],
    [("ffn 0", 0.60), ("copy", 0.25)],
    [("constant 0", 0.45), ("zero", 0.40)],
    [("zero", 0.44), ("ffn 1", 0.35)],
]
DROPPED = {(0, "ffn 0"), (0, "ffn 1"), (2, "zero")}
"""With one seat each the more probable of two tokens has it: 0.60, not 0.50; 0.35, not 0.30; 0.44, not 0.40."""

ONE_SEAT = "model.moe.capacity_factor=0.6"
"""ceil(0.6 x 0.75 x 8 / 5.25) = 1 seat in an FFN expert, ceil(0.6 x 8 / 5.25) = 1 in another, of 8 choices."""


def loaded(*settings: str) -> LoadedModel:
    logits = [[math.log(p) for p in SCORES.get(token, [1 / 6] * 6)] for token in range(8)]
    return known_model(ONE_SEAT, *settings, logits_VE=logits)


def words(choices: list[Choice]) -> list[tuple[str, float]]:
    return [(choice.name, round(choice.weight, 3)) for choice in choices]


def test_every_choice_of_every_token() -> None:
    trace = trace_text(loaded(), "2 3 4 5")
    assert (trace.ids, trace.seats, [layer.block for layer in trace.layers]) == ([2, 3, 4, 5], None, [0, 1])
    for layer in trace.layers:
        assert [words(choices) for choices in layer.choices] == CHOSEN
        assert all(choice.kept for choices in layer.choices for choice in choices)
        assert all(choice.probability == choice.weight for choices in layer.choices for choice in choices)
        assert [trace.ffn_count(layer, token) for token in range(4)] == [2, 1, 0, 1]
        assert layer.share == {"ffn": 0.5, "constant": 0.125, "copy": 0.125, "zero": 0.25}
        assert (layer.ffn_experts, layer.dropped) == (1.0, 0.0)
        assert layer.top_1 == pytest.approx((0.50 + 0.60 + 0.45 + 0.44) / 4, rel=1e-4)
        assert layer.top_2 == pytest.approx((0.30 + 0.25 + 0.40 + 0.35) / 4, rel=1e-4)
        assert layer.entropy == pytest.approx(ENTROPY, rel=1e-4)
    assert [trace.mean_ffn(token) for token in range(4)] == [2, 1, 0, 1]


def test_seats_of_a_training_step_and_what_they_drop() -> None:
    model = loaded()
    trace = trace_text(model, "2 3 4 5", seats=True)
    assert trace.seats == (1, 1)
    for layer in trace.layers:
        assert [words(choices) for choices in layer.choices] == CHOSEN
        dropped = {(t, choice.name) for t, choices in enumerate(layer.choices) for choice in choices if not choice.kept}
        assert dropped == DROPPED
        assert [trace.ffn_count(layer, token) for token in range(4)] == [0, 1, 0, 1]
        assert (layer.ffn_experts, layer.dropped) == (0.5, 3 / 8)
        assert layer.share["ffn"] == 0.5  # as chosen
    assert not any(module.training for module in model.model.modules())
    assert trace_text(model, "2 3 4 5").seats is None


def test_combine_weights_are_not_probabilities_everywhere() -> None:
    trace = trace_text(loaded("model.moe.combine=renormalize_computing", "model.moe.combine_scale=2.0"), "2 4")
    first, second = trace.layers[0].choices
    assert words(first) == [("ffn 0", 1.25), ("ffn 1", 0.75)]
    assert words(second) == [("constant 0", 2.0), ("zero", 0.0)]
    assert [round(choice.probability, 3) for choice in second] == [0.45, 0.40]


def test_a_threshold_gives_tokens_different_numbers_of_experts() -> None:
    """Those before hold less than 0.55: 0 and 0.5; 0; 0 and 0.45; 0 and 0.44."""
    trace = trace_text(loaded("model.moe.router.threshold=0.55", "model.moe.capacity_factor=2.0"), "2 3 4 5")
    assert [words(choices) for choices in trace.layers[0].choices] == [CHOSEN[0], CHOSEN[1][:1], *CHOSEN[2:]]


def test_biases_choose_and_do_not_weigh() -> None:
    model = loaded("model.moe.controller.rate=0.1")
    bias_LE = torch.tensor([[0.0, 0.0, 5.0, 0, 0, 0], [0.0] * 6])
    trace = trace_text(LoadedModel(**{**vars(model), "bias_LE": bias_LE}), "2")
    assert words(trace.layers[0].choices[0]) == [("ffn 2", 0.1), ("ffn 0", 0.5)]
    assert words(trace.layers[1].choices[0]) == CHOSEN[0]


def test_names_of_experts() -> None:
    assert expert_names(ExpertKinds(2, 1, 1, 1)) == ["ffn 0", "ffn 1", "constant 0", "copy", "zero"]
    assert expert_names(ExpertKinds(1, 0, 2, 2)) == ["ffn 0", "copy 0", "copy 1", "zero 0", "zero 1"]
    assert expert_names(ExpertKinds(1, 0, 0, 0)) == ["ffn 0"]


def test_pieces_make_up_the_text() -> None:
    tokenizer = load_tokenizer(ROOT / "tests/golden/shards/tokenizer/tokenizer.model")
    for text in ("Python is a  language.\n\tdef f(x):", "a", "[red]x[/red] \\n"):
        ids = tokenizer.encode_batch([text])[0].tolist()
        assert "".join(token_pieces(tokenizer, ids)) == text
    ids = tokenizer.encode_batch(["\N{SNOWMAN}"])[0].tolist()  # bytes that are no character each
    assert set("".join(token_pieces(tokenizer, ids))) <= {" ", "\N{REPLACEMENT CHARACTER}", "\N{SNOWMAN}"}


def printed(trace: Trace, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    print_trace(trace, console)
    return console.export_text()


def test_what_is_printed() -> None:
    text = printed(trace_text(loaded(), "2 3 4 5", seats=True), 100)
    assert text.startswith(
        "4 tokens, 2 MoE layers; 1 seats in an FFN expert, 1 in another; (in brackets) found no seat\n"
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows[:3] == [
        ["0", "'2'", "(ffn 0 0.50)", "(ffn 0 0.50)"],
        ["", "", "(ffn 1 0.30)", "(ffn 1 0.30)"],
        ["", "", "= 0 FFN", "= 0 FFN"],
    ]
    assert ["", "", "copy 0.25", "copy 0.25"] in rows
    # the balance loss over its perfect value is checked where it is computed
    assert [line.split()[:-1] for line in text.splitlines()[-2:]] == [
        [str(block), "50%", "12%", "12%", "25%", "0.50", "37.5%", f"{ENTROPY:.2f}", "0.50", "0.32"] for block in (0, 1)
    ]
    means = text[text.index("FFN experts per token, mean over layers:") :].splitlines()[1]
    assert re.findall(r"' ?(\d)' (\d.\d\d)", means) == [("2", "0.00"), ("3", "1.00"), ("4", "0.00"), ("5", "1.00")]


@pytest.mark.parametrize("width", [80, 120])
def test_many_layers_stay_readable(width: int) -> None:
    """24 of them are a few tables side by side, each cell whole, and no line is wider than the console."""
    trace = trace_text(known_model("model.num_layers=24"), "2 3")
    text = printed(trace, width)
    assert max(map(len, text.splitlines())) <= width
    heads = [line for line in text.splitlines() if "┃ token ┃" in line]
    assert len(heads) == {80: 5, 120: 3}[width]
    for block in range(24):
        assert sum(f" block {block} " in line for line in heads) == 1
    assert "…" not in text


def test_pieces_print_as_they_are(tmp_path: Path) -> None:
    """Brackets are no markup, line ends and control characters are spelled out, long ones are cut."""
    trace = trace_text(loaded(), "2 3 4 5")
    odd = Trace(trace.ids, ["[red]", "\n", "\x1b[31m", "x" * 40], trace.layers, trace.num_ffn, None)
    text = printed(odd, 100)
    for shown in ("'[red]'", r"'\n'", r"'\x1b[31m'", "'xxxxxxxxxxxx..."):
        assert shown in text
    assert "\x1b" not in text


def test_for_scripts() -> None:
    model = loaded()
    content = as_json(trace_text(model, "2 3", seats=False), model)
    content = json.loads(json.dumps(content))
    assert content["tokens"] == [{"id": 2, "piece": "2", "mean_ffn": 2.0}, {"id": 3, "piece": " 3", "mean_ffn": 1.0}]
    assert (content["checkpoint"], content["step"], content["seats"]) == ("nowhere", 7, None)
    layer = content["layers"][1]
    assert (layer["block"], layer["ffn_count"], layer["ffn_experts"]) == (1, [2, 1], 1.5)
    choice = layer["choices"][1][1]
    assert (choice["expert"], choice["name"], choice["kept"]) == (4, "copy", True)
    assert choice["weight"] == choice["probability"] == pytest.approx(0.25, rel=1e-4)
    assert as_json(trace_text(model, "2 3", seats=True), model)["seats"] == {"ffn": 1, "zero_computation": 1}


def test_what_cannot_be_traced() -> None:
    model = loaded()
    with pytest.raises(DataError, match="the text is empty"):
        trace_text(model, "")
    with pytest.raises(DataError, match="the text has 65 tokens"):
        trace_text(model, "3 " * 65)
    dropless = known_model("model.moe.dropless=true")
    assert trace_text(dropless, "2").seats is None
    with pytest.raises(RecipeError, match="model.moe.dropless is true: training has no seats either; leave out"):
        trace_text(dropless, "2", seats=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What it writes is what the model did: every choice against the router's own answer."""
    start_run(tmp_path / "run", "model.moe.every=3", std=0.3)
    file = tmp_path / "trace.json"
    asked = ["trace", "--checkpoint", str(tmp_path / "run"), "--text", "import os", "--json", str(file)]
    assert moepp(monkeypatch, *asked, "--set", "model.moe.top_k=3") == 0
    said = capsys.readouterr().out
    assert "1 MoE layers; dropless" in said and "block 2" in said and "block 0" not in said
    content = json.loads(file.read_text())
    loaded_again = load_model(tmp_path / "run", ["model.moe.top_k=3"], device="cpu")
    ids = [token["id"] for token in content["tokens"]]
    with torch.no_grad():
        _, (out,) = loaded_again.model.hidden(torch.tensor([ids]))
    found = [choice["expert"] for choices in content["layers"][0]["choices"] for choice in choices]
    assert found == out.routing.expert_N.tolist() and len(found) == 3 * len(ids)
    assert moepp(monkeypatch, *asked[:-1], str(tmp_path / "nosuch/trace.json")) == 1
    assert "cannot be written: name a file in a folder that exists" in capsys.readouterr().err
