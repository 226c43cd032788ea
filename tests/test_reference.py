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
    torch.testing.assert_close(actual.detach(), tensor(expected), rtol=0, atol=1e-14)


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
        # 0.75 * 1.1 * 2 * 16 / 16 = 1.65 -> 2, but never fewer than 5, and never more than the tokens.
        ("ffn", 16, {"min_capacity": 1}, 2),
        ("ffn", 16, {"min_capacity": 5}, 5),
        ("ffn", 3, {"min_capacity": 5}, 3),
    ],
)
def test_capacity(kind: str, num_tokens: int, changes: dict, seats: int) -> None:
    settings = replace(ReferenceSettings(top_k=2, tau=0.75, capacity_factor=1.1), **changes)
    assert capacity(kind, KINDS_16_4, num_tokens, settings) == seats


def test_capacity_of_vanilla_experts_does_not_depend_on_tau() -> None:
    # gamma tau K T / (tau N) = 1.1 * 2 * 32 / 8 = 8.8.
    for tau in (0.1, 0.75, 1.0):
        assert capacity("ffn", ["ffn"] * 8, 32, ReferenceSettings(top_k=2, tau=tau)) == 9


def test_capacity_with_a_threshold_is_xmoes() -> None:
    # gamma is the mean number of experts per token that there are seats for: 8 * 2000 / 64 = 250.
    settings = ReferenceSettings(top_k=None, threshold=0.9, capacity_counts="tokens", capacity_factor=8.0)
    assert capacity("ffn", ["ffn"] * 64, 2000, settings) == 250


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
    # All are first choices, so by rank means by probability.
    assert kept_of(drop(x_TD, drop_policy="rank")) == kept_of(by_probability)


def test_equal_probabilities_keep_the_earlier_token() -> None:
    # 2 seats; of the four for copy, token 3 is best and tokens 0, 1, 2 are equal: the first of these stays.
    out = drop([[1, 0], [1, 0], [1, 0], [5, 0], [0, 9], [0, 9]])
    assert kept_of(out) == [True, False, False, True, True, True]


def test_a_first_choice_is_seated_before_a_likelier_second_one() -> None:
    # exp(logits) of FFN, copy, zero. Token 0: 1 9 10, copy second at 9/20. Token 1: 1 8/5 7/5, copy first at 8/20.
    # Token 2: 1 4/5 1/5, copy second at 8/20. One seat each: 1 * 3 / 3. Zero: first choice of token 0, second of 1.
    x_TD = [[log(9), log(10)], [log(8 / 5), log(7 / 5)], [log(4 / 5), log(1 / 5)]]
    by_rank = drop(x_TD, top_k=2, capacity_counts="tokens", drop_policy="rank")
    assert by_rank.routes == (((2, True), (1, False)), ((1, True), (2, False)), ((0, True), (1, False)))
    by_probability = drop(x_TD, top_k=2, capacity_counts="tokens", drop_policy="probability")
    assert by_probability.routes == (((2, True), (1, True)), ((1, False), (2, False)), ((0, True), (1, False)))
    # Two seats each: 1.1 * 3 / 3. Of the two second choices of copy, the likelier one is token 0's.
    two_seats = drop(x_TD, top_k=2, capacity_counts="tokens", drop_policy="rank", capacity_factor=1.1)
    assert two_seats.routes == (((2, True), (1, True)), ((1, True), (2, True)), ((0, True), (1, False)))


def test_of_equal_rank_and_probability_the_earlier_token_is_seated() -> None:
    # One seat. Copy is the second choice of tokens 0 and 1 alike, and of token 2 with less.
    x_TD = [[log(2), log(4)], [log(2), log(4)], [log(2), log(9)]]
    out = drop(x_TD, top_k=2, capacity_counts="tokens", drop_policy="rank")
    assert out.routes == (((2, False), (1, True)), ((2, False), (1, False)), ((2, True), (1, False)))


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


# What the router sees and how it scores


def test_two_layer_router() -> None:
    # tanh(log(3) / 2) = (3 - 1) / (3 + 1) = 1/2, tanh(0) = 0; W2 doubles it back to the bench's logits.
    one_layer = bench().router_ED
    assert one_layer is not None
    hidden_XD, residual_EE = tensor([[log(3) / 2, 0], [0, log(3) / 2], [0, 0]]), torch.eye(5, dtype=torch.float64)
    router_EX = torch.cat([2 * one_layer, torch.full_like(one_layer[:, :1], 7)], dim=1)
    weights = replace(bench(), router_ED=None, hidden_XD=hidden_XD, router_EX=router_EX, residual_EE=residual_EE)
    out = reference_layer(tensor([[1, 0], [0, 1]]), None, weights, ReferenceSettings(dropless=True))
    equal(out.logits_TE, [[log(4), log(2), 0, 0, 0], [0, log(3), 0, 0, log(5)]])
    # The residual of the previous layer comes on top.
    out = reference_layer(tensor([[1, 0]]), tensor([[0, 0, 5, 0, -1]]), weights, ReferenceSettings(dropless=True))
    equal(out.logits_TE, [[log(4), log(2), 5, 0, -1]])


def test_normalised_logits_have_the_asked_deviation_and_do_not_travel() -> None:
    # Logits 3 1 -1 -1 -2: mean 0, squares 9 + 1 + 1 + 1 + 4 = 16, over n - 1 = 4: deviation 2. Asked for 1/2: / 4.
    router_ED = tensor([[3, 0], [1, 0], [-1, 0], [-1, 0], [-2, 0]]).requires_grad_()
    settings = ReferenceSettings(logit_std=0.5, dropless=True)
    out = reference_layer(tensor([[1, 0]]), None, replace(bench(), router_ED=router_ED), settings)
    equal(out.logits_TE, [[3, 1, -1, -1, -2]])
    exp = [e**0.75, e**0.25, e**-0.25, e**-0.25, e**-0.5]
    equal(out.probability_TE, [[number / sum(exp) for number in exp]])
    equal(out.z_loss, log(sum(exp)) ** 2)
    # W times any number gives the same p, so dp/dW along W is 0; that needs the gradient through the deviation.
    (grad_ED,) = torch.autograd.grad(out.probability_TE[0, 0], router_ED)
    equal((grad_ED * router_ED).sum(), 0)
    assert grad_ED.abs().max() > 0.01


def test_jitter_is_for_the_router_alone() -> None:
    # Token [1, 0] with its first feature doubled: exp(logits) = 16 4 1 1 1, sum 23. The expert still sees [1, 0].
    settings = ReferenceSettings(top_k=1, dropless=True)
    out = reference_layer(tensor([[1, 0]]), None, bench(), settings, noise_TD=tensor([[2, 5]]))
    equal(out.logits_TE, [[log(16), log(4), 0, 0, 0]])
    hidden = 3 * e / (e + 1)
    equal(out.output_TD, [[16 / 23 * hidden, -16 / 23 * hidden]])


def test_z_loss_is_the_mean_square_of_log_sum_exp() -> None:
    out = reference_layer(tensor([[1, 0], [0, 1]]), None, bench(), ReferenceSettings())
    equal(out.z_loss, (log(9) ** 2 + log(11) ** 2) / 2)


# How many experts, and which


def chosen_at(threshold: float, x_D: Sequence[float] = (1, 0), **more: Any) -> list[int]:
    settings = ReferenceSettings(top_k=None, threshold=threshold, dropless=True)
    out = reference_layer(tensor([x_D]), None, bench(), settings, **more)
    return [expert for expert, _ in out.routes[0]]


@pytest.mark.parametrize(
    ("threshold", "experts"),
    # p = 4 2 1 1 1 over 9, so the mass before each is 0, .444, .667, .778, .889.
    [
        (0.0, [0]),
        (0.44, [0]),
        (0.45, [0, 1]),
        (0.66, [0, 1]),
        (0.67, [0, 1, 2]),
        (0.78, [0, 1, 2, 3]),
        (0.88, [0, 1, 2, 3]),
        (0.89, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_threshold_takes_experts_while_those_before_hold_less(threshold: float, experts: list[int]) -> None:
    assert chosen_at(threshold) == experts


def test_threshold_that_is_met_exactly_takes_no_more() -> None:
    # Four experts at 1/4 each: the mass before the third is 1/2, which is not less than 1/2.
    weights = replace(bench(), router_ED=torch.zeros(4, 2, dtype=torch.float64))
    for threshold, number in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)):
        settings = ReferenceSettings(top_k=None, threshold=threshold, num_zero=0, dropless=True)
        out = reference_layer(tensor([[1, 0]]), None, weights, settings)
        assert [expert for expert, _ in out.routes[0]] == list(range(number))


def test_threshold_one_takes_all_even_those_without_mass() -> None:
    # Logits -2000 log 4 and so on underflow: p = 0 0 1/3 1/3 1/3 has all its mass before the last two.
    assert chosen_at(1.0, (-2000, 0)) == [2, 3, 4, 1, 0]


def test_tokens_take_different_numbers_of_experts_and_share_seats() -> None:
    # t = 0.6: token [1, 0] (4 2 1 1 1 over 9) takes 0, 1; token [0, 1] (1 3 1 1 5 over 11) takes 4, 1, its mass
    # before copy and the rest being 8/11; token [9, 0] takes 0 alone. tau 1, gamma 1.5: 1.5 * 3 / 5 = 0.9, one seat.
    settings = ReferenceSettings(
        top_k=None, threshold=0.6, tau=1.0, capacity_counts="tokens", capacity_factor=1.5, drop_policy="rank"
    )
    out = reference_layer(tensor([[1, 0], [0, 1], [9, 0]]), None, bench(), settings)
    # FFN: both first choices, token 2 the likelier; constant 1: both second choices, 3/11 > 2/9.
    assert out.routes == (((0, False), (1, False)), ((4, True), (1, True)), ((0, True),))
    equal(out.output_TD[:2], [[0, 0], [3 / 11 * 8.0, 3 / 11 * 16.2]])  # raw probability, nothing renormalised
    assert out.wanted_E == (2, 2, 0, 0, 1) and out.kept_E == (1, 1, 0, 0, 1) and out.first_E == (2, 0, 0, 0, 1)
    assert out.histogram_H == (2, 1)


def test_bias_changes_who_is_chosen_and_nothing_else() -> None:
    # p = 4 2 1 1 1 over 9; with 4/9 on copy it is 4 2 1 5 1: copy first, then FFN. Weights stay 1/9 and 4/9.
    bias_E = tensor([0, 0, 0, 4 / 9, 0]).requires_grad_()
    x_TD = tensor([[1, 0]]).requires_grad_()
    out = reference_layer(x_TD, None, bench(), ReferenceSettings(dropless=True), bias_E=bias_E)
    assert [expert for expert, _ in out.routes[0]] == [3, 0]
    hidden = 3 * e / (e + 1)
    equal(out.output_TD, [[1 / 9 + 4 / 9 * hidden, -4 / 9 * hidden]])
    equal(out.probability_TE, [[4 / 9, 2 / 9, 1 / 9, 1 / 9, 1 / 9]])
    equal(out.logits_TE, [[log(4), log(2), 0, 0, 0]])
    (gradient,) = torch.autograd.grad(out.output_TD.sum(), bias_E, allow_unused=True)
    assert gradient is None
    # A threshold counts the mass without the bias: 1/9 before FFN, 5/9 before constant 1, 7/9 before constant 2.
    assert chosen_at(0.1, bias_E=bias_E) == [3]
    assert chosen_at(0.5, bias_E=bias_E) == [3, 0]
    assert chosen_at(0.6, bias_E=bias_E) == [3, 0, 1]


# Weights, inputs, shared experts


@pytest.mark.parametrize(
    ("combine", "first", "second"),
    # Token [1, 0] chooses FFN (4/9) and constant 1 (2/9); token [0, 1] zero (5/11) and constant 1 (3/11).
    [
        ("softmax", (4 / 9, 2 / 9), 3 / 11),
        ("renormalize_selected", (2 / 3, 1 / 3), 3 / 8),
        ("renormalize_computing", (2 / 3, 1 / 3), 1),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_combine(combine: Any, first: tuple[float, float], second: float, scale: float) -> None:
    settings = ReferenceSettings(dropless=True, combine=combine, combine_scale=scale)
    out = reference_layer(tensor([[1, 0], [0, 1]]), None, bench(), settings)
    hidden = 3 * e / (e + 1)
    both = [first[0] * hidden + first[1] * 3.25, -first[0] * hidden + first[1] * 5.0]
    equal(out.output_TD, [[scale * both[0], scale * both[1]], [scale * second * 8.0, scale * second * 16.2]])


@pytest.mark.parametrize(("combine", "weight"), [("renormalize_selected", 4 / 6), ("renormalize_computing", 4 / 5)])
def test_a_drop_does_not_change_the_weights_of_the_others(combine: Any, weight: float) -> None:
    # Token [1, 0] chose FFN (4/9), copy (1/9, dropped) and zero (1/9).
    routes = [[(0, True), (3, False), (4, True)]]
    out = reference_layer(tensor([[1, 0]]), None, bench(), ReferenceSettings(combine=combine), routes)
    equal(out.output_TD, [[weight * 3 * e / (e + 1), -weight * 3 * e / (e + 1)]])


def with_shared(*, gated: bool) -> ReferenceWeights:
    """Two shared experts. Of [1, 0] they make 3 silu(1) [1, -1] and 2 silu(1) [1, 1]; the gate is 3/4."""
    return replace(
        bench(),
        shared_gate_EFD=tensor([[[1, 2]], [[1, 0]]]),
        shared_up_EFD=tensor([[[3, 4]], [[2, 0]]]),
        shared_down_EDF=tensor([[[1], [-1]], [[1], [1]]]),
        shared_gate_D=tensor([log(3), 9]) if gated else None,
    )


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts(gated: bool) -> None:
    # Copy alone, chosen at 1/9, its input doubled and its weight tripled: 3 * 1/9 * 2 x. The shared ones see plain x.
    settings = ReferenceSettings(combine_scale=3.0, expert_input_scale=2.0)
    out = reference_layer(tensor([[1, 0]]), None, with_shared(gated=gated), settings, [[(3, True)]])
    shared = (3 / 4 if gated else 1) * e / (e + 1)
    equal(out.output_TD, [[6 / 9 + 5 * shared, -1 * shared]])
    assert out.wanted_E == (0, 0, 0, 1, 0) and out.histogram_H == (1, 0)


def test_shared_experts_are_one_ffn_of_their_widths_together() -> None:
    several = with_shared(gated=True)
    assert several.shared_gate_EFD is not None and several.shared_up_EFD is not None
    assert several.shared_down_EDF is not None
    one = replace(
        several,
        shared_gate_EFD=several.shared_gate_EFD.reshape(1, 2, 2),
        shared_up_EFD=several.shared_up_EFD.reshape(1, 2, 2),
        shared_down_EDF=several.shared_down_EDF.transpose(0, 2).transpose(0, 1).reshape(1, 2, 2),
    )
    x_TD, settings = tensor([[1, 0], [0.5, -2]]), ReferenceSettings(dropless=True)
    expected = reference_layer(x_TD, None, several, settings).output_TD
    torch.testing.assert_close(reference_layer(x_TD, None, one, settings).output_TD, expected, rtol=0, atol=1e-14)


def test_a_token_of_zero_experts_alone_is_what_the_shared_ones_make_of_it() -> None:
    # Token [0, 1] at top-1 chooses the zero expert; shared, ungated: gate [2, 0], up [4, 0]: 4 silu(2) [1, -1].
    settings = ReferenceSettings(top_k=1, dropless=True, combine="renormalize_computing")
    out = reference_layer(tensor([[0, 1]]), None, bench(), settings)
    assert out.routes == (((4, True),),)
    equal(out.output_TD, [[0, 0]])
    out = reference_layer(tensor([[0, 1]]), None, with_shared(gated=False), settings)
    hidden = 4 * 2 / (1 + e**-2)
    equal(out.output_TD, [[hidden, -hidden]])


def test_expert_input_scale_reaches_every_kind() -> None:
    def scaled(expert: int) -> Tensor:
        settings = ReferenceSettings(top_k=1, expert_input_scale=2.0, combine="renormalize_selected")
        return reference_layer(tensor([[1, 0]]), None, bench(), settings, [[(expert, True)]]).output_TD[0]

    # FFN: gate 2, up 6. Constant 1: scores [2 log 3, 0], a = [9/10, 1/10]: 9/10 [2, 0] + 1/10 [10, 20].
    hidden = 6 * 2 / (1 + e**-2)
    equal(scaled(0), [hidden, -hidden])
    equal(scaled(1), [2.8, 2.0])
    equal(scaled(3), [2, 0])
    equal(scaled(4), [0, 0])


# Balance


def two_zeros() -> ReferenceWeights:
    """The bench with its second constant and its copy expert changed into one more copy and zero expert."""
    weights = bench()
    return replace(
        weights,
        constant_selector_J2D=weights.constant_selector_J2D[:1],
        constant_value_JD=weights.constant_value_JD[:1],
    )


@pytest.mark.parametrize(
    ("changes", "share", "loss", "normalized"),
    # P = 53 49 20 20 56 over 198 (see above), f = 1/2 1 0 0 1/2; tau 0.75, so that eta is 1 and four times 3/4.
    # FFN, constant, copy, zero, zero. Normalised: times (1 + 4 / 0.75) / sum f.
    [
        ({}, None, 84.25 / 198, 84.25 / 198 * (19 / 3) / 2),
        # Group means 1/2 and 3/8: 1/2 * 53 + 3/4 * 3/8 * 145.
        ({"balance": "per_group"}, None, 67.28125 / 198, 67.28125 / 198 * (19 / 3) / 2),
        # Zero experts at 1/4 each: 1/2 * 53 + 3/4 * (49 + 1/4 * 76).
        ({"balance": "null_averaged"}, None, 77.5 / 198, 77.5 / 198 * (19 / 3) / 2),
        ({"balance": "none"}, None, 0.0, 84.25 / 198 * (19 / 3) / 2),
        # First choices: f = 1/2 0 0 0 1/2, so 1/2 * 53 + 3/4 * 1/2 * 56.
        ({"balance_counts": "first"}, None, 47.5 / 198, 47.5 / 198 * (19 / 3) / 1),
        # Zero experts at 1/4: 1/2 * 53 + 3/4 * 1/4 * 76.
        ({"balance": "null_averaged", "balance_counts": "first"}, None, 40.75 / 198, 40.75 / 198 * (19 / 3) / 1),
        # Load from outside: 53/10 + 3/4 * (2 * 49 + 3 * 20 + 4 * 20 + 5 * 56) / 10.
        ({}, [0.1, 0.2, 0.3, 0.4, 0.5], 44.15 / 198, 44.15 / 198 * (19 / 3) / 1.5),
        # Its zero experts at 0.45 each: (53 + 3/4 * (98 + 60 + 4.5 * 76)) / 10.
        ({"balance": "null_averaged"}, [0.1, 0.2, 0.3, 0.4, 0.5], 42.8 / 198, 42.8 / 198 * (19 / 3) / 1.5),
        # Its groups at 0.1 and 0.35: (53 + 3/4 * 3.5 * 145) / 10.
        ({"balance": "per_group"}, [0.1, 0.2, 0.3, 0.4, 0.5], 43.3625 / 198, 43.3625 / 198 * (19 / 3) / 1.5),
    ],
)
def test_balance(changes: dict, share: list[float] | None, loss: float, normalized: float) -> None:
    settings = replace(ReferenceSettings(num_zero=2, dropless=True), **changes)
    share_E = None if share is None else tensor(share)
    out = reference_layer(tensor([[1, 0], [0, 1]]), None, two_zeros(), settings, share_E=share_E)
    equal(out.balance_loss, loss)
    equal(out.normalized_balance, normalized)


@pytest.mark.parametrize("balance", ["per_expert", "per_group", "null_averaged", "none"])
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_perfect_balance_is_one(balance: Any, tau: float) -> None:
    # p and f both as tau to 1, for FFN to others.
    weights = replace(two_zeros(), router_ED=tensor([[log(tau), 0]] + [[0, 0]] * 4))
    settings = ReferenceSettings(num_zero=2, tau=tau, balance=balance)
    share_E = tensor([tau, 1, 1, 1, 1]) * 0.4
    out = reference_layer(tensor([[1, 0]]), None, weights, settings, share_E=share_E)
    equal(out.normalized_balance, 1)


def test_balance_gradient_goes_through_the_probabilities_alone() -> None:
    # One token, FFN alone: L = f P = p_0, so dL/dlogit = p_0 (1 - p_0), -p_0 p_1, ...; x = [1, 0].
    router_ED = tensor([[log(2), 0], [0, 0], [0, 0]]).requires_grad_()
    settings = ReferenceSettings(top_k=1, dropless=True)
    out = reference_layer(tensor([[1, 0]]), None, replace(without_constants(), router_ED=router_ED), settings)
    (gradient,) = torch.autograd.grad(out.balance_loss, router_ED)
    equal(gradient, [[1 / 4, 0], [-1 / 8, 0], [-1 / 8, 0]])
    assert out.balance_loss.requires_grad and not out.normalized_balance.requires_grad


# Statistics


def test_statistics_are_sums_over_tokens() -> None:
    out = reference_layer(tensor([[1, 0], [0, 1]]), None, bench(), ReferenceSettings(dropless=True))
    assert out.first_E == (1, 0, 0, 0, 1)
    assert out.histogram_H == (1, 1)  # FFN computes the first token; there is only one, so no more than 1
    equal(out.entropy, (log(9) - (4 * log(4) + 2 * log(2)) / 9) + (log(11) - (3 * log(3) + 5 * log(5)) / 11))
    equal(out.top1, 4 / 9 + 5 / 11)
    equal(out.top2, 2 / 9 + 3 / 11)


def test_histogram_counts_what_was_computed() -> None:
    # Three FFN, one copy, one zero. Token [1, 0] ranks them 0 1 2, token [0, 1] ranks them 4 1 0; at top-2 both seats
    # of expert 1 (1.1 * 2 * 2 * 0.75 / 4.25 = 0.8, one) go to the likelier 3/11.
    weights = bench()
    three = replace(
        weights,
        gate_EFD=weights.gate_EFD.expand(3, 1, 2),
        up_EFD=weights.up_EFD.expand(3, 1, 2),
        down_EDF=weights.down_EDF.expand(3, 2, 1),
        constant_selector_J2D=torch.zeros(0, 2, 2, dtype=torch.float64),
        constant_value_JD=torch.zeros(0, 2, dtype=torch.float64),
    )
    x_TD = tensor([[1, 0], [0, 1]])
    out = reference_layer(x_TD, None, three, ReferenceSettings())
    assert out.routes == (((0, True), (1, False)), ((4, True), (1, True)))
    assert out.histogram_H == (0, 2, 0)
    assert reference_layer(x_TD, None, three, ReferenceSettings(dropless=True)).histogram_H == (0, 1, 1)
    assert reference_layer(x_TD, None, three, ReferenceSettings(top_k=5, dropless=True)).histogram_H == (0, 0, 0, 2)
    threshold = ReferenceSettings(top_k=None, threshold=0.0, dropless=True)
    assert reference_layer(x_TD, None, three, threshold).histogram_H == (1, 1, 0, 0)


def test_one_expert_has_no_second_probability() -> None:
    weights = replace(without_constants(), router_ED=tensor([[1, 2]]))
    settings = ReferenceSettings(top_k=1, num_copy=0, num_zero=0)
    out = reference_layer(tensor([[1, 0]]), None, weights, settings)
    equal(out.top1, 1)
    equal(out.top2, 0)
    equal(out.entropy, 0)


# Gradients


def test_gradient_of_the_gate_by_hand() -> None:
    # Token x = [1, 0] to copy: logits z = W x = [0, 1, 0], p = e / (e + 2), y = p x.
    # dp/dz_copy = p (1 - p), dp/dz_other = -p / (e + 2), so dy_0/dW[i, 0] = x_0 x_0 dp/dz_i; x_1 = 0.
    weights = without_constants()
    assert weights.router_ED is not None
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


@pytest.mark.parametrize(
    "changes",
    [
        {"combine": "renormalize_computing", "balance": "null_averaged", "logit_std": 0.7},
        {"combine": "renormalize_selected", "balance": "per_group", "top_k": None, "threshold": 0.6},
    ],
)
def test_gradients_of_every_choice_agree_with_finite_differences(changes: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(9)  # every kind is used, some choices drop

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    shapes = {  # T 5, D 3, F 2, X 4, and 2 FFN experts, 1 constant, 1 copy, 1 zero, 2 shared
        "hidden_XD": (4, 3),
        "router_EX": (5, 4),
        "gate_EFD": (2, 2, 3),
        "up_EFD": (2, 2, 3),
        "down_EDF": (2, 3, 2),
        "constant_selector_J2D": (1, 2, 3),
        "constant_value_JD": (1, 3),
        "residual_EE": (5, 5),
        "shared_gate_EFD": (2, 2, 3),
        "shared_up_EFD": (2, 2, 3),
        "shared_down_EDF": (2, 3, 2),
        "shared_gate_D": (3,),
    }
    inputs = (random(5, 3), random(5, 5), *(random(*shape) for shape in shapes.values()))
    noise_TD, bias_E = 1 + 0.1 * random(5, 3).detach(), 0.1 * random(5).detach()
    more: dict[str, Any] = {"capacity_counts": "tokens", "drop_policy": "rank", "combine_scale": 1.5}
    settings = ReferenceSettings(**more, expert_input_scale=2.0, **changes)

    def run(x_TD: Tensor, previous_TE: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights = ReferenceWeights(None, **dict(zip(shapes, rest, strict=True)))
        out = reference_layer(x_TD, previous_TE, weights, settings, bias_E=bias_E, noise_TD=noise_TD)
        assert sum(out.kept_E) < sum(out.wanted_E) and 0 not in out.kept_E
        return out.output_TD, out.logits_TE, out.balance_loss, out.z_loss

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
    with pytest.raises(ValueError, match="a router is router_ED, or hidden_XD and router_EX; give one of the two"):
        reference_layer(x_TD, None, replace(bench(), hidden_XD=x_TD), settings)
    with pytest.raises(ValueError, match="share_E has 1 rows for 5 experts; it needs one row for each"):
        reference_layer(x_TD, None, bench(), settings, share_E=tensor([1]))
    with pytest.raises(ValueError, match="top_k 2 with threshold 0.5; give one and None for the other"):
        reference_layer(x_TD, None, bench(), replace(settings, threshold=0.5))
    with pytest.raises(ValueError, match="there is no top_k to count; use tokens"):
        reference_layer(x_TD, None, bench(), replace(settings, top_k=None, threshold=0.5))
    with pytest.raises(ValueError, match="have a None, but seats are limited; give all, or dropless"):
        reference_layer(x_TD, None, bench(), replace(settings, min_capacity=None))
