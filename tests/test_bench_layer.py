"""The measurement of whole layers: all that take turns compute the same function. No time is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import drawn
from torch import Tensor
from typer.testing import CliRunner

from moepp_ds.__main__ import app
from moepp_ds.bench.cases import Graph, PlainProducts
from moepp_ds.bench.layer import (
    DEEPSPEED,
    DENSE,
    LOOP,
    MIXTRAL,
    MIXTRAL_EAGER,
    OWN,
    PRODUCTS,
    VANILLA,
    VANILLA_PRODUCTS,
    layer_cases,
)
from moepp_ds.bench.presets import LayerSizes
from moepp_ds.bench.routes import balanced_choices, steered_tokens
from moepp_ds.kinds import ExpertKinds

KINDS = ExpertKinds(num_ffn=4, num_constant=2, num_copy=1, num_zero=1)
SIZES = LayerSizes(32, 48, KINDS)


def _cases(tau: float = 0.5) -> dict[str, object]:
    return layer_cases(SIZES, tau, tokens=80, dtype=torch.float32, device=torch.device("cpu"))  # type: ignore


def _results(case: object) -> tuple[Tensor, Tensor, Tensor]:
    """The output; and, of the output alone, the gradients of the tokens and of the router."""
    assert isinstance(case, Graph)
    output_TD = case.compute()[0]
    router = next(tensor for tensor in case.wanted[1:] if tensor.ndim == 2 and tensor.shape[-1] == SIZES.hidden_size)
    return output_TD, *torch.autograd.grad(output_TD.square().sum(), [case.wanted[0], router])


def test_tokens_choose_what_they_are_steered_to() -> None:
    choices = [balanced_choices(replace(KINDS, num_copy=n), tau=0.5, tokens=60, top_k=3) for n in (0, 1)]
    x_TD, routers = steered_tokens(choices, [7, 8], hidden_size=32)
    for expert_TK, weight_ED in zip(choices, routers):
        logits_TE = x_TD @ weight_ED.t()
        assert torch.equal(logits_TE.topk(3, dim=-1).indices, expert_TK)
        wanted_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, torch.tensor([[6.0, 5.0, 4.0]]).expand(60, 3))
        torch.testing.assert_close(logits_TE, wanted_TE, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="15 experts need as many directions, but tokens have 14"):
        steered_tokens(choices, [7, 8], hidden_size=14)


def test_the_loop_is_the_layer() -> None:
    cases = _cases()
    for own, theirs in zip(_results(cases[OWN]), _results(cases[LOOP])):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rival", [DEEPSPEED, MIXTRAL, MIXTRAL_EAGER])
def test_the_rivals_are_the_vanilla_twin(rival: str) -> None:
    cases = _cases()
    for own, theirs in zip(_results(cases[VANILLA]), _results(cases[rival])):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)


def test_the_dense_ffn_is_the_first_experts_together() -> None:
    cases = _cases()
    own, dense = cases[VANILLA], cases[DENSE]
    assert isinstance(own, Graph) and isinstance(dense, Graph)
    x_TD, (gate_up_EDG, down_EFD) = own.wanted[0], own.wanted[-2:]
    expected_TD = torch.zeros_like(x_TD)
    for gate_up_DG, down_FD in zip(gate_up_EDG[:2], down_EFD[:2]):
        gate_TF, value_TF = (x_TD @ gate_up_DG).chunk(2, dim=-1)
        expected_TD = expected_TD + (torch.nn.functional.silu(gate_TF) * value_TF) @ down_FD
    torch.testing.assert_close(dense.compute()[0], expected_TD, atol=1e-5, rtol=1e-4)


def test_the_products_are_those_of_the_kept_rows() -> None:
    cases = _cases()
    own, twin = cases[PRODUCTS], cases[VANILLA_PRODUCTS]
    assert isinstance(own, PlainProducts) and isinstance(twin, PlainProducts)
    assert own.counts == (13, 13, 13, 14) and twin.counts == (40,) * 4
    assert own.rows_RD.shape == (53, 32) and own.product_RG.shape == (53, 96) and own.hidden_RF.shape == (53, 48)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_command(tmp_path: Path, dtype: str) -> None:
    options = ["--tokens", "24", "--repeats", "1", "--dtype", dtype, "--device", "cpu"]
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.svg")]
    done = CliRunner().invoke(app, ["bench", "layer", *options, *files])
    assert done.exit_code == 0, done.output
    assert {OWN, MIXTRAL, "forward", "forward + backward", "seconds"} <= drawn(tmp_path / "found.svg")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["tau"], round(found["ideal"], 3)) == (0.75, 1.667)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {OWN, VANILLA, LOOP, DEEPSPEED, MIXTRAL, MIXTRAL_EAGER, DENSE, PRODUCTS, VANILLA_PRODUCTS}
    assert rows[OWN]["own"] == rows[VANILLA]["vanilla_backward"] == 1.0
    assert rows[VANILLA]["own"] == pytest.approx(rows[VANILLA]["time"] / rows[OWN]["time"])
    assert CliRunner().invoke(app, ["bench", "layer", *options, "--tau", "0"]).exit_code == 2
