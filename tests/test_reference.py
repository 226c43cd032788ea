"""The oracle itself, against numbers worked out by hand.

One bench for most cases: D = 2, F = 1, and five experts: FFN (index 0), constant (1, 2), copy (3), zero (4).
Its logits are logarithms of small whole numbers, so that probabilities are plain fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import e, log
from typing import Any

import pytest
import torch
from torch import Tensor

from moepp_ds.reference import (
    ReferenceOutput,
    ReferenceSettings,
    ReferenceWeights,
    capacity,
    expert_kinds,
    reference_layer,
)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equal(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-14)


def bench() -> ReferenceWeights:
    """Column 0 of W answers to token [1, 0], column 1 to token [0, 1]."""
    return ReferenceWeights(
        router_ED=tensor([[log(4), 0], [log(2), log(3)], [0, 0], [0, 0], [0, log(5)]]),
        gate_EFD=tensor([[[1, 2]]]),
        up_EFD=tensor([[[3, 4]]]),
        down_EDF=tensor([[[1], [-1]]]),
        constant_selector_J2D=tensor([[[log(3), 0], [0, log(4)]], [[0, 0], [0, 0]]]),
        constant_value_JD=tensor([[10, 20], [6, 8]]),
    )


def alone(expert: int, x_D: list[float]) -> Tensor:
    """One token sent to one expert; its probability is divided out."""
    settings = ReferenceSettings(top_k=1)
    out = reference_layer(tensor([x_D]), None, bench(), settings, routes=[[(expert, True)]])
    return out.output_TD[0] / out.probability_TE[0, expert]


def test_kinds_are_in_the_order_of_the_released_model() -> None:
    assert expert_kinds(bench(), ReferenceSettings(num_copy=1, num_zero=2)) == [
        "ffn",
        "constant",
        "constant",
        "copy",
        "zero",
        "zero",
    ]


def test_every_expert_alone() -> None:
    # FFN, x = [1, 0]: gate 1, up 3, silu(1) = 1 / (1 + 1/e) = e / (e + 1); down copies it, and its negative.
    hidden = 3 * e / (e + 1)
    equal(alone(0, [1, 0]), [hidden, -hidden])
    # Constant 1, x = [1, 0]: scores [log 3, 0], a = [3/4, 1/4]; 3/4 [1, 0] + 1/4 [10, 20].
    equal(alone(1, [1, 0]), [3.25, 5.0])
    # Constant 1, x = [0, 1]: scores [0, log 4], a = [1/5, 4/5]; 1/5 [0, 1] + 4/5 [10, 20].
    equal(alone(1, [0, 1]), [8.0, 16.2])
    # Constant 2 has W_c = 0, so a = [1/2, 1/2]: the mean of x and v = [6, 8].
    equal(alone(2, [1, 0]), [3.5, 4.0])
    equal(alone(3, [1, -7]), [1, -7])
    equal(alone(4, [1, -7]), [0, 0])


def test_top_two_combined_by_probability_without_renormalising() -> None:
    # Token [1, 0]: exp(logits) = 4 2 1 1 1, sum 9; chooses FFN (4/9) and constant 1 (2/9).
    # Token [0, 1]: exp(logits) = 1 3 1 1 5, sum 11; chooses zero (5/11) and constant 1 (3/11).
    out = reference_layer(tensor([[1, 0], [0, 1]]), None, bench(), ReferenceSettings(dropless=True))
    hidden = 3 * e / (e + 1)
    equal(out.logits_TE, [[log(4), log(2), 0, 0, 0], [0, log(3), 0, 0, log(5)]])
    equal(out.probability_TE, [[4 / 9, 2 / 9, 1 / 9, 1 / 9, 1 / 9], [1 / 11, 3 / 11, 1 / 11, 1 / 11, 5 / 11]])
    equal(
        out.output_TD,
        [
            [4 / 9 * hidden + 2 / 9 * 3.25, -4 / 9 * hidden + 2 / 9 * 5.0],
            [3 / 11 * 8.0, 3 / 11 * 16.2],
        ],
    )
    assert out.routes == (((0, True), (1, True)), ((4, True), (1, True)))
    assert out.wanted_E == out.kept_E == (1, 2, 0, 0, 1)


def test_equal_logits_go_to_the_lower_index_and_top_k_may_be_anything() -> None:
    # Token [1, 0] has logits log 4, log 2, 0, 0, 0: of three equal ones the third choice is index 2.
    out = reference_layer(tensor([[1, 0]]), None, bench(), ReferenceSettings(top_k=3, dropless=True))
    assert [expert for expert, _ in out.routes[0]] == [0, 1, 2]
    out = reference_layer(tensor([[0, 1]]), None, bench(), ReferenceSettings(top_k=5, dropless=True))
    assert [expert for expert, _ in out.routes[0]] == [4, 1, 0, 2, 3]


def test_balance_loss_counts_choices_and_weighs_kinds() -> None:
    # The two tokens above: f = [1/2, 1, 0, 0, 1/2] (sum K = 2).
    # P = mean of [4/9, 2/9, ., ., 1/9] and [1/11, 3/11, ., ., 5/11] = [53/198, 49/198, ., ., 56/198].
    # L = 1 * 1/2 * 53/198 + 3/4 * 1 * 49/198 + 3/4 * 1/2 * 56/198 = (26.5 + 36.75 + 21) / 198 = 84.25 / 198.
    x_TD = tensor([[1, 0], [0, 1]])
    out = reference_layer(x_TD, None, bench(), ReferenceSettings(tau=0.75))
    equal(out.balance_loss, 84.25 / 198)
    # With tau 0.25 every zero-computation term is a third of that: (26.5 + 12.25 + 7) / 198.
    out = reference_layer(x_TD, None, bench(), ReferenceSettings(tau=0.25))
    equal(out.balance_loss, 45.75 / 198)


def test_balance_loss_counts_dropped_choices_too() -> None:
    # Three times the same token: 2 seats for the FFN expert (see below), but f = [1, 1, 0, 0, 0] and P = p.
    # L = 1 * 4/9 + 3/4 * 2/9 = 5.5/9.
    settings = ReferenceSettings(top_k=2, tau=0.75, capacity_factor=1.1)
    out = reference_layer(tensor([[1, 0]] * 3), None, bench(), settings)
    assert out.wanted_E == (3, 3, 0, 0, 0)
    assert out.kept_E == (2, 2, 0, 0, 0)
    equal(out.balance_loss, 5.5 / 9)


def test_gating_residual_adds_the_mapped_logits() -> None:
    # Wg moves logit 4 of the previous layer onto expert 3, doubled; the current W x gives the rest.
    residual = torch.zeros(5, 5, dtype=torch.float64)
    residual[3, 4] = 2
    weights = replace(bench(), residual_EE=residual)
    previous = tensor([[7, 7, 7, 7, log(3)]])
    out = reference_layer(tensor([[1, 0]]), previous, weights, ReferenceSettings(dropless=True))
    equal(out.logits_TE, [[log(4), log(2), 0, 2 * log(3), 0]])
    # exp = 4 2 1 9 1, sum 17: the copy expert now comes first.
    assert [expert for expert, _ in out.routes[0]] == [3, 0]
    equal(out.probability_TE[0, 3], 9 / 17)
    # The first block has no previous logits: its residual map is not used.
    out = reference_layer(tensor([[1, 0]]), None, weights, ReferenceSettings(dropless=True))
    equal(out.logits_TE, [[log(4), log(2), 0, 0, 0]])


KINDS_16_4 = ["ffn"] * 16 + ["constant"] * 2 + ["copy", "zero"]


@pytest.mark.parametrize(
    ("kind", "num_tokens", "changes", "seats"),
    [
        # tau N_FFN + N_ZC = 0.75 * 16 + 4 = 16. A zero-computation expert: 1.1 * 2 * 4096 / 16 = 563.2,
        ("copy", 4096, {}, 564),
        # an FFN expert three quarters of that, 422.4.
        ("ffn", 4096, {}, 423),
        # Eq 8 as printed, without K: 281.6 and 211.2.
        ("zero", 4096, {"capacity_counts": "tokens"}, 282),
        ("ffn", 4096, {"capacity_counts": "tokens"}, 212),
        # Exactly whole: 1.1 * 2 * 400 / 16 = 55, which floating point makes 55.00000000000001.
        ("constant", 400, {}, 55),
        # Fewer than one: 0.75 * 1.1 * 2 * 1 / 16 = 0.1 -> 1.
        ("ffn", 1, {}, 1),
        # More than one for each token: 100 * 2 * 4 / 16 = 50 -> 4.
        ("zero", 4, {"capacity_factor": 100.0}, 4),
    ],
)
def test_capacity(kind: str, num_tokens: int, changes: dict, seats: int) -> None:
    settings = replace(ReferenceSettings(top_k=2, tau=0.75, capacity_factor=1.1), **changes)
    assert capacity(kind, KINDS_16_4, num_tokens, settings) == seats


def test_capacity_of_vanilla_experts_does_not_depend_on_tau() -> None:
    # gamma tau K T / (tau N) = 1.1 * 2 * 32 / 8 = 8.8.
    for tau in (0.1, 0.75, 1.0):
        assert capacity("ffn", ["ffn"] * 8, 32, ReferenceSettings(top_k=2, tau=tau)) == 9


def without_constants() -> ReferenceWeights:
    """FFN (index 0), copy (1), zero (2). Token [a, b] has the logits 0, a, b."""
    return replace(
        bench(),
        router_ED=tensor([[0, 0], [1, 0], [0, 1]]),
        constant_selector_J2D=torch.zeros(0, 2, 2, dtype=torch.float64),
        constant_value_JD=torch.zeros(0, 2, dtype=torch.float64),
    )


def drop(x_TD: Sequence[Sequence[float]], **changes: Any) -> ReferenceOutput:
    """Top-1 over three experts with gamma 1 and tau 1, so that each has a seat for a third of the tokens."""
    settings = replace(ReferenceSettings(top_k=1, tau=1.0, capacity_factor=1.0), **changes)
    return reference_layer(tensor(x_TD), None, without_constants(), settings)


def kept_of(out: ReferenceOutput) -> list[bool]:
    return [choices[0][1] for choices in out.routes]


def test_drop_by_probability_by_position_and_dropless() -> None:
    # Six tokens [a, 0] with a > 0 all choose copy (logit a against 0 and 0). Seats: 1 * 6 / 3 = 2.
    x_TD: list[list[float]] = [[1, 0], [2, 0], [4, 0], [1, 0], [3, 0], [2, 0]]
    by_probability = drop(x_TD)
    assert kept_of(by_probability) == [False, False, True, False, True, False]  # the largest a: 4 and 3
    assert by_probability.wanted_E == (0, 6, 0)
    assert by_probability.kept_E == (0, 2, 0)
    p = by_probability.probability_TE[2, 1]
    equal(p, e**4 / (e**4 + 2))
    # A token that lost its only choice gives 0; the kept one its gate times x.
    equal(by_probability.output_TD[0], [0, 0])
    equal(by_probability.output_TD[2], [4 * p.item(), 0])
    assert kept_of(drop(x_TD, drop_policy="position")) == [True, True, False, False, False, False]
    assert kept_of(drop(x_TD, dropless=True)) == [True] * 6


def test_equal_probabilities_keep_the_earlier_token() -> None:
    # 2 seats; of the four for copy, token 3 is best and tokens 0, 1, 2 are equal: the first of these stays.
    out = drop([[1, 0], [1, 0], [1, 0], [5, 0], [0, 9], [0, 9]])
    assert kept_of(out) == [True, False, False, True, True, True]


def test_ffn_and_zero_computation_experts_have_different_seats() -> None:
    # tau 0.5, 1 FFN + 2 others: 0.5 + 2 = 2.5. Ten tokens, gamma 1, K 1: FFN 0.5 * 10 / 2.5 = 2, others 4.
    # Tokens [-1, -1] choose the FFN expert, [1, 0] copy.
    out = drop([[-1.0, -1.0]] * 5 + [[1.0, 0.0]] * 5, tau=0.5)
    assert out.wanted_E == (5, 5, 0)
    assert out.kept_E == (2, 4, 0)
    assert kept_of(out) == [True, True, False, False, False, True, True, True, True, False]


def test_imposed_routes_use_the_layers_own_probabilities() -> None:
    # p = 4 2 1 1 1 over 9. Token 0 goes to copy (kept), constant 2 (dropped), zero (kept); token 1 to none.
    routes = [[(3, True), (2, False), (4, True)], []]
    x_TD = tensor([[1, 0], [1, 0]])
    out = reference_layer(x_TD, None, bench(), ReferenceSettings(tau=0.75), routes=routes)
    equal(out.output_TD, [[1 / 9, 0], [0, 0]])
    assert out.wanted_E == (0, 0, 1, 1, 1)
    assert out.kept_E == (0, 0, 0, 1, 1)
    # Three zero-computation experts chosen by half of the tokens each: 3 * 0.75 * 1/2 * 1/9.
    equal(out.balance_loss, 0.125)
    # Routes read back give the same again.
    again = reference_layer(x_TD, None, bench(), ReferenceSettings(tau=0.75), routes=out.routes)
    assert torch.equal(again.output_TD, out.output_TD) and again.routes == out.routes


def test_gradient_of_the_gate_by_hand() -> None:
    # Token x = [1, 0] to copy: logits z = W x = [0, 1, 0], p = e / (e + 2), y = p x.
    # dp/dz_copy = p (1 - p), dp/dz_other = -p / (e + 2), so dy_0/dW[i, 0] = x_0 x_0 dp/dz_i; x_1 = 0.
    weights = without_constants()
    weights.router_ED.requires_grad_()
    out = reference_layer(tensor([[1, 0]]), None, weights, ReferenceSettings(top_k=1, dropless=True))
    out.output_TD[0, 0].backward()
    p = e / (e + 2)
    other = -p / (e + 2)
    assert weights.router_ED.grad is not None
    equal(weights.router_ED.grad, [[other, 0], [p * (1 - p), 0], [other, 0]])


def test_all_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(4)  # a draw in which every kind is used and two choices drop

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    shapes = {  # T 6, D 3, F 2, and 2 FFN experts, 1 constant, 1 copy, 1 zero
        "router_ED": (5, 3),
        "gate_EFD": (2, 2, 3),
        "up_EFD": (2, 2, 3),
        "down_EDF": (2, 3, 2),
        "constant_selector_J2D": (1, 2, 3),
        "constant_value_JD": (1, 3),
        "residual_EE": (5, 5),
    }
    inputs = (random(6, 3), random(6, 5), *(random(*shape) for shape in shapes.values()))

    def run(x_TD: Tensor, previous_TE: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = ReferenceWeights(**dict(zip(shapes, rest, strict=True)))
        out = reference_layer(x_TD, previous_TE, weights, ReferenceSettings())
        assert out.wanted_E == (2, 4, 1, 4, 1) and out.kept_E == (2, 3, 1, 3, 1)
        return out.output_TD, out.logits_TE, out.balance_loss

    assert torch.autograd.gradcheck(run, inputs)


def test_wrong_input_is_refused() -> None:
    settings, x_TD = ReferenceSettings(), tensor([[1, 0]])
    with pytest.raises(ValueError, match=r"x_TD is torch.float32, not torch.float64; pass x_TD.double\(\)"):
        reference_layer(x_TD.float(), None, bench(), settings)
    with pytest.raises(ValueError, match="router_ED has 5 rows for 6 experts; it needs one row for each"):
        reference_layer(x_TD, None, bench(), replace(settings, num_zero=2))
    with pytest.raises(ValueError, match="previous_logits_TE without weights.residual_EE: give both"):
        reference_layer(x_TD, torch.zeros(1, 5, dtype=torch.float64), bench(), settings)
    with pytest.raises(ValueError, match=r"top_k 6 is outside 1\.\.5, the number of experts"):
        reference_layer(x_TD, None, bench(), replace(settings, top_k=6))
    with pytest.raises(ValueError, match="2 routes for 1 tokens; give each token one list of choices"):
        reference_layer(x_TD, None, bench(), settings, routes=[[], []])
    with pytest.raises(ValueError, match=r"token 0 is routed to \[1, 1\]; they must differ, within 0\.\.4"):
        reference_layer(x_TD, None, bench(), settings, routes=[[(1, True), (1, True)]])
