"""Every pair of choices of the layer, against the float64 oracle, by every fast path, and on two ranks.

The combinations are made in tests/programs/layer_grid.py; two ranks run tests/programs/layer_grid_checks.py.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from layer_oracle import Oracle, close, counts_of, gradients, relative, routes_of, values_of
from programs import layer_grid
from programs.checks import expect, start
from programs.layer_grid import COMBINATIONS, Case, make_case, make_layer, total_loss
from torch import Tensor

from moepp_ds.experts import Backend
from moepp_ds.moe_layer import MoELayer, MoEOutput
from moepp_ds.reference import ReferenceOutput

NUMBERS = range(len(COMBINATIONS))

REFUSED = {
    ("choice", "threshold 0.3", "seats", "assignments"),  # there is no top_k to count
    ("choice", "threshold 0.7", "seats", "assignments"),
    ("choice", "threshold 1", "seats", "assignments"),
    ("choice", "top 1", "combine", "renormalize_selected"),  # the weight would be 1 whatever the score
    ("choice", "top 1", "combine", "renormalize_computing"),
    ("experts", "FFN only", "balance", "per_group"),  # there is one group
    ("experts", "FFN only", "balance", "null_averaged"),  # there are no zero experts
    ("experts", "copy", "balance", "null_averaged"),
    ("experts", "constants", "balance", "null_averaged"),
    ("drop policy", "probability", "seats", "dropless"),  # nobody is dropped
    ("drop policy", "position", "seats", "dropless"),
    ("drop policy", "rank", "seats", "dropless"),
    ("seats", "dropless", "fewest seats", "4"),
}
"""The pairs that a recipe refuses; tests of the recipe say so."""


def test_every_two_choices_meet_at_least_twice() -> None:
    pairs = layer_grid.pairs_of(layer_grid.CHOICES)
    met = Counter(pair for combination in COMBINATIONS for pair in combinations(combination.items(), 2))
    refused = {pair for pair in pairs if not layer_grid.is_allowed(dict(pair))}
    assert {(*one, *other) for one, other in refused} == REFUSED
    assert len(pairs) == 1586 and met.keys() == set(pairs) - refused
    assert min(met.values()) >= 2
    assert len(COMBINATIONS) == len({tuple(combination.items()) for combination in COMBINATIONS}) == 76
    for combination in COMBINATIONS:
        assert list(combination) == list(layer_grid.FACTORS)
        layer_grid.moe_config(combination)  # raises for a combination that a recipe refuses


def test_the_grid_comes_out_the_same_every_time() -> None:
    assert layer_grid.cover(layer_grid.CHOICES, layer_grid.is_allowed, times=2) == COMBINATIONS


def test_cover_of_a_small_table_by_hand() -> None:
    # Two values each of three choices, and a2 never with b2: four combinations can hold the other eleven pairs.
    table = {"a": ["a1", "a2"], "b": ["b1", "b2"], "c": ["c1", "c2"]}
    found = layer_grid.cover(table, lambda made: not made.items() >= {"a": "a2", "b": "b2"}.items(), times=1)
    assert [tuple(made.values()) for made in found] == [
        ("a1", "b1", "c1"),
        ("a1", "b2", "c2"),
        ("a2", "b1", "c2"),
        ("a2", "b1", "c1"),
        ("a1", "b2", "c1"),
    ]


def layer_of(case: Case, number: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> MoELayer:
    return make_layer(
        case.config, ffn_hidden_size=16, has_residual=True, seed=number, dtype=dtype, device=device
    )


def leaves_of(case: Case, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": case.x_TD, "previous logits": case.previous_TE, **parameters}


def loss_of(case: Case, out: MoEOutput | ReferenceOutput) -> Tensor:
    return total_loss(case, out.output_TD, out.logits_TE, out.balance_loss, out.z_loss)


@pytest.mark.parametrize("number", NUMBERS)
def test_layer_is_the_oracle(number: int) -> None:
    """Values, losses, statistics and every gradient, in float64, each routing for itself."""
    case = make_case(number)
    layer = layer_of(case, number)
    oracle = Oracle(layer, case.config)
    out = layer(case.x_TD, case.previous_TE, recompute=case.recompute, **case.told)
    expected = oracle(case.x_TD, case.previous_TE, told=case.told)
    assert routes_of(out.routing, out.plan) == [list(choices) for choices in expected.routes]
    assert counts_of(out) == counts_of(expected)
    values = values_of(out)
    for name, value in values_of(expected).items():
        close(values[name], value, name, limit=1e-9)
    actual_grads = gradients(loss_of(case, out), leaves_of(case, dict(layer.named_parameters())))
    for name, grad in gradients(loss_of(case, expected), leaves_of(case, oracle.leaves)).items():
        close(actual_grads[name], grad, f"gradient of {name}", limit=1e-9)


BACKENDS: tuple[Backend, ...] = ("slices", "grouped_mm")
NUMBERS_OF_A_TYPE = [
    (torch.float32, "cpu", 1e-5),
    (torch.bfloat16, "cpu", 2e-2),
    pytest.param(torch.float32, "cuda", 1e-5, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, "cuda", 2e-2, marks=pytest.mark.gpu),
]


def widened(case: Case) -> Case:
    """The same numbers in float64, as leaves of another graph."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double()

    return replace(
        case,
        x_TD=wide(case.x_TD).requires_grad_(),
        previous_TE=wide(case.previous_TE).requires_grad_(),
        told={name: None if tensor is None else wide(tensor) for name, tensor in case.told.items()},
        output_grad_TD=wide(case.output_grad_TD),
        logits_grad_TE=wide(case.logits_grad_TE),
    )


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("dtype", "device", "limit"), NUMBERS_OF_A_TYPE)
def test_fast_paths_are_the_oracle_on_their_routes(
    dtype: torch.dtype, device: str, limit: float, number: int
) -> None:
    """Weights and inputs are numbers of `dtype`; the oracle computes with the same numbers in float64."""
    case = make_case(number, dtype=dtype, device=device)
    layer = layer_of(case, number, dtype=dtype, device=device)
    outs, forward = [], layer.experts.forward
    for backend in BACKENDS:
        use_it = functools.partial(forward, backend=backend)
        layer.experts.forward = use_it  # type: ignore[method-assign]
        out = layer(case.x_TD, case.previous_TE, recompute=case.recompute, **case.told)
        outs.append((out, gradients(loss_of(case, out), leaves_of(case, dict(layer.named_parameters())))))
    oracle, wide = Oracle(layer, case.config), widened(case)
    routes = routes_of(outs[0][0].routing, outs[0][0].plan)
    expected = oracle(wide.x_TD, wide.previous_TE, routes, told=wide.told)
    expected_grads = gradients(loss_of(wide, expected), leaves_of(wide, oracle.leaves))
    for backend, (out, grads) in zip(BACKENDS, outs):
        assert out.output_TD.dtype == dtype and out.logits_TE.dtype == torch.float32
        assert routes_of(out.routing, out.plan) == routes and counts_of(out) == counts_of(expected)
        errors = {name: relative(value, values_of(expected)[name]) for name, value in values_of(out).items()}
        output_error = errors.pop("output_TD")
        assert output_error < limit, backend
        assert max(errors.values()) < 1e-5, (backend, errors)  # the router computes in fp32 whatever dtype is
        errors = {name: relative(grads[name], grad) for name, grad in expected_grads.items()}
        assert max(errors.values()) < limit, (backend, errors)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    log = tmp_path_factory.mktemp("layer_grid") / "log.txt"
    return start("tests.programs.layer_grid_checks", world=2, log=log, launcher="deepspeed")


@pytest.mark.dist
@pytest.mark.parametrize("number", NUMBERS)
def test_two_ranks_are_one(on_two_ranks: dict[str, str], number: int) -> None:
    """Experts spread over two ranks: outputs, losses, statistics and gradients are those of one rank with all."""
    expect(on_two_ranks, f"combination_{number}")
